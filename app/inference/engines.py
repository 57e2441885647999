"""The engines that are up, and which of them answers a request."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, func, orm, select
from sqlalchemy.dialects.postgresql import insert

from app.core.engine import AdapterRef, Heartbeat
from app.core.spec import USUAL
from app.models import Engine

RESTARTED_WITHIN = timedelta(minutes=5)  # a base that is prepared already loads in seconds, a new image may have to be pulled
LONG_QUEUE = 16  # requests more than elsewhere, for which loading an adapter anew is worth its while
FORGOTTEN_AFTER = timedelta(hours=1)


def record(session: orm.Session, beat: Heartbeat, *, timeout_seconds: float = 0.0) -> None:
    """Remember that an engine lives. One that leaves counts as silent for `timeout_seconds`: expected back, and not asked."""
    silent_seconds = timeout_seconds if beat.is_leaving else 0.0
    values = {
        "url": beat.url,
        "base": beat.base,
        "base_digest": beat.base_digest,
        "quantization": beat.quantization,
        "running": beat.running,
        "waiting": beat.waiting,
        "adapters": beat.adapters,
        "heartbeat_at": func.clock_timestamp() - timedelta(seconds=silent_seconds),
    }
    upsert = insert(Engine).values(id=beat.engine_id, **values)
    session.execute(upsert.on_conflict_do_update(index_elements=[Engine.id], set_=values))
    session.execute(delete(Engine).where(Engine.heartbeat_at < func.clock_timestamp() - FORGOTTEN_AFTER))


def list_live(session: orm.Session, *, timeout_seconds: float) -> Sequence[Engine]:
    """Engines heard of lately."""
    alive = Engine.heartbeat_at > func.clock_timestamp() - timedelta(seconds=timeout_seconds)
    return session.scalars(select(Engine).where(alive).order_by(Engine.id)).all()


def answering(engines: Sequence[Engine], base: str, adapter: AdapterRef | None) -> list[Engine]:
    """Those that can answer for the adapter: they hold the very base it was trained on. The base itself is asked as it is
    usually held, and otherwise only where no engine holds it so."""
    of_base = [engine for engine in engines if engine.base == base]
    if adapter is not None and adapter.base_digest is not None:
        return [engine for engine in of_base if engine.base_digest == adapter.base_digest]
    usual = [engine for engine in of_base if engine.quantization == USUAL]
    return usual if usual or adapter else of_base


def list_expected(session: orm.Session) -> Sequence[Engine]:
    """Engines that have been silent for no longer than a restart takes."""
    lately = Engine.heartbeat_at > func.clock_timestamp() - RESTARTED_WITHIN
    return session.scalars(select(Engine).where(lately)).all()


def ranked(engines: Sequence[Engine], adapters: Sequence[AdapterRef]) -> list[Engine]:
    """Engines in the order to try them. Adapters prefer the same engine everywhere (rendezvous hashing), so that few engines hold
    them, unless many wait there and fewer elsewhere; the base goes to whoever is least busy."""
    if not adapters:
        return sorted(engines, key=lambda engine: engine.running + engine.waiting)
    name = " ".join(adapter.internal_name for adapter in adapters)
    shortest = min((engine.waiting for engine in engines), default=0)
    return sorted(
        engines,
        key=lambda engine: (
            engine.waiting >= shortest + LONG_QUEUE,
            hashlib.sha256(f"{engine.id} {name}".encode()).digest(),
        ),
    )
