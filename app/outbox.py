"""Nothing is published from inside a transaction: a row is. The relay acts on it after the commit."""

from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import func, orm, text

from app.core import ids, tracing
from app.models import OutboxMessage

CHANNEL = "tunesmith_relay"


class Topic(StrEnum):
    """What the relay can be asked to do."""

    RING = "ring"  # tell Celery to look at a queue: {"queue": …, "trace": …}
    PREFETCH = "prefetch"  # tell the engines of a base to fetch an adapter: an AdapterRef
    PURGE = "purge"  # delete what lies under a storage prefix: {"prefix": …}
    TIDY = "tidy"  # delete of that what no row knows: whoever stored it died before it could say so


def ring(session: orm.Session, queue: str) -> None:
    """Wake the workers of this queue after the commit. A lost ring is rung again, a second one is harmless."""
    put(session, Topic.RING, {"queue": queue, "trace": tracing.current()})


def put(session: orm.Session, topic: Topic, payload: dict[str, Any], *, after: timedelta | None = None) -> None:
    """`after` this time, or at once."""
    due = {"not_before": func.clock_timestamp() + after} if after else {}
    session.add(OutboxMessage(id=ids.new("out_"), topic=topic, payload=payload, **due))
    if not after:
        notify(session)


def notify(session: orm.Session) -> None:
    """Wake the relay at the commit. Postgres folds equal notifications of one transaction into one."""
    session.execute(text(f"SELECT pg_notify('{CHANNEL}', '')"))
