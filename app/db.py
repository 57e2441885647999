"""Connections to Postgres: one pool per process, each session one transaction."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, event, func, orm, select, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

STATEMENT_TIMEOUT_SECONDS = 30
LOCK_TIMEOUT_SECONDS = 10
REQUEST_TIMEOUT_SECONDS = 5  # for statements that a client of the API waits for
CONNECT_SECONDS = 3
POOL_SECONDS = 5  # for a connection that others have
MARGIN_SECONDS = 1.0  # a server that lives says itself that a statement took too long
CHECK_SECONDS = 0.1
LISTEN_AGAIN_SECONDS = 1.0
# what a session raises when the database is away; how a commit ended is then unknown
OUTAGE = (OperationalError, InterfaceError, PoolTimeout)
# for every connection: a machine that is gone, or a link that is cut, is noticed within half a minute
KEEPALIVES: dict[str, Any] = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}

T = TypeVar("T")


def open_sessions(
    url: SecretStr, *, pool_size: int = 10, statement_seconds: int = STATEMENT_TIMEOUT_SECONDS
) -> orm.sessionmaker[orm.Session]:
    """A factory of sessions. Nothing connects before the first query, so a process may start before its database."""
    engine = create_engine(
        url.get_secret_value(),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=POOL_SECONDS,
        pool_pre_ping=True,
        connect_args={"connect_timeout": CONNECT_SECONDS, "application_name": "tunesmith", **KEEPALIVES},
    )
    _set_timeouts(engine, statement_seconds)
    return orm.sessionmaker(engine, expire_on_commit=False)


@contextmanager
def organization_session(sessions: orm.sessionmaker[orm.Session], organization_id: str) -> Iterator[orm.Session]:
    """One transaction that sees this organization's rows: committed at the end of the block, rolled back if it raises."""
    with sessions.begin() as session:
        use_organization(session, organization_id)
        yield session


def use_organization(session: orm.Session, organization_id: str) -> None:
    """Let the rest of this transaction see this organization's rows, and no other's (row-level security)."""
    session.execute(text("SELECT set_config('app.org', :org, true)"), {"org": organization_id})


def take_turns(session: orm.Session, name: str) -> None:
    """Wait for whoever is in a transaction under this name, and let the next one wait for this transaction's end."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


async def notifications(url: SecretStr, channel: str, *, on_outage: Callable[[psycopg.Error], None]) -> AsyncIterator[str | None]:
    """The payloads of a channel, for ever; None whenever listening begins, for what was committed while nobody did."""
    address = url.get_secret_value().replace("postgresql+psycopg", "postgresql", 1)
    while True:
        try:
            opening = psycopg.AsyncConnection.connect(address, autocommit=True, connect_timeout=5, **KEEPALIVES)
            async with await opening as connection:
                await connection.execute(f"LISTEN {channel}")
                yield None
                async for notification in connection.notifies():
                    yield notification.payload
        except psycopg.Error as error:
            on_outage(error)
            await asyncio.sleep(LISTEN_AGAIN_SECONDS)


def is_outage(error: Exception) -> bool:
    """Whether the database was away, and not unwilling."""
    return isinstance(error, OUTAGE) or (isinstance(error, DBAPIError) and error.connection_invalidated)


class _Connection(psycopg.Connection[Any]):
    """Gives up a server that hangs. A frozen one still acknowledges what it is sent, so no option of the socket would."""

    answer_seconds = STATEMENT_TIMEOUT_SECONDS + MARGIN_SECONDS

    def wait(self, gen: PQGen[T], interval: float = CHECK_SECONDS, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is None and self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()  # its answer may still come, and must not be taken for that to another question
            raise


def _set_timeouts(engine: Engine, statement_seconds: int) -> None:
    @event.listens_for(engine, "do_connect")
    def connect(_: object, __: object, arguments: Any, options: Any) -> _Connection:
        return _Connection.connect(*arguments, **options)

    @event.listens_for(engine, "connect")
    def on_connect(connection: _Connection, _: ConnectionPoolEntry) -> None:
        connection.answer_seconds = statement_seconds + MARGIN_SECONDS
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = '{statement_seconds}s'")
            cursor.execute(f"SET lock_timeout = '{min(LOCK_TIMEOUT_SECONDS, statement_seconds)}s'")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'")
        connection.commit()
