"""Connections to Postgres: one pool per process, each session one transaction."""

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import Connection
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, event, orm, text
from sqlalchemy.pool import ConnectionPoolEntry

STATEMENT_TIMEOUT_SECONDS = 30
LOCK_TIMEOUT_SECONDS = 10


def open_sessions(url: SecretStr, *, pool_size: int = 10) -> orm.sessionmaker[orm.Session]:
    """A factory of sessions. Nothing connects before the first query, so a process may start before its database."""
    engine = create_engine(
        url.get_secret_value(),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "application_name": "tunesmith"},
    )
    _set_timeouts(engine)
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


def _set_timeouts(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Connection[tuple[object, ...]], _: ConnectionPoolEntry) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'")
            cursor.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'")
        connection.commit()
