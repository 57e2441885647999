"""The engines that are up, and which of them answers a request."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, func, orm, select
from sqlalchemy.dialects.postgresql import insert

from app.core.engine import AdapterRef, Heartbeat
from app.models import Engine

RESTARTED_WITHIN = timedelta(minutes=5)  # a base that is prepared already loads in seconds, a new image may have to be pulled
FORGOTTEN_AFTER = timedelta(hours=1)


def record(session: orm.Session, beat: Heartbeat) -> None:
    """Remember that an engine lives."""
    values = {
        "url": beat.url,
        "base": beat.base,
        "base_digest": beat.base_digest,
        "running": beat.running,
        "waiting": beat.waiting,
        "heartbeat_at": func.clock_timestamp(),
    }
    upsert = insert(Engine).values(id=beat.engine_id, **values)
    session.execute(upsert.on_conflict_do_update(index_elements=[Engine.id], set_=values))
    session.execute(delete(Engine).where(Engine.heartbeat_at < func.clock_timestamp() - FORGOTTEN_AFTER))


def list_live(session: orm.Session, base: str | None = None, *, timeout_seconds: float) -> Sequence[Engine]:
    """Engines heard of lately, of one base or of all."""
    alive = Engine.heartbeat_at > func.clock_timestamp() - timedelta(seconds=timeout_seconds)
    query = select(Engine).where(alive).order_by(Engine.id)
    return session.scalars(query if base is None else query.where(Engine.base == base)).all()


def is_expected(session: orm.Session, base: str) -> bool:
    """Whether an engine that served the base has been silent for no longer than a restart takes."""
    lately = Engine.heartbeat_at > func.clock_timestamp() - RESTARTED_WITHIN
    return session.scalar(select(Engine.id).where(Engine.base == base, lately).limit(1)) is not None


def ranked(engines: Sequence[Engine], adapter: AdapterRef | None) -> list[Engine]:
    """Engines in the order to try them. An adapter prefers the same engine everywhere (rendezvous hashing), so that few
    engines hold it; the base goes to whoever is least busy."""
    if adapter is None:
        return sorted(engines, key=lambda engine: engine.running + engine.waiting)
    return sorted(engines, key=lambda engine: hashlib.sha256(f"{engine.id} {adapter.internal_name}".encode()).digest())
