"""Relays and workers that say they live; engines have their own register in app/inference/engines.py."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, func, orm, select
from sqlalchemy.dialects.postgresql import insert

from app.models import Process

BEAT_SECONDS = 10.0
ALIVE_WITHIN = timedelta(seconds=45)
FORGOTTEN_AFTER = timedelta(days=1)


def record(session: orm.Session, id: str, *, kind: str, queues: Sequence[str] = (), broker_seconds: float) -> None:
    """Remember that a process lives. `broker_seconds` ago the broker has answered it, or it began."""
    now = func.statement_timestamp()  # the same one in both columns
    values = {
        "kind": kind,
        "queues": list(queues),
        "heartbeat_at": now,
        "broker_at": now - timedelta(seconds=broker_seconds),
    }
    upsert = insert(Process).values(id=id, **values)
    session.execute(upsert.on_conflict_do_update(index_elements=[Process.id], set_=values))
    session.execute(delete(Process).where(Process.heartbeat_at < now - FORGOTTEN_AFTER))


def list_live(session: orm.Session) -> Sequence[Process]:
    alive = Process.heartbeat_at > func.clock_timestamp() - ALIVE_WITHIN
    return session.scalars(select(Process).where(alive).order_by(Process.kind, Process.id)).all()
