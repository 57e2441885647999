"""Run by Alembic. One migration at a time on one database, and none that waits long for a lock others hold."""

from alembic import context
from sqlalchemy import Connection, create_engine, text

from app.core.settings import Settings
from app.models import Table

ADVISORY_LOCK = 7_301_947  # any number that nothing else in this database locks


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata, compare_server_default=True)
    with context.begin_transaction():
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        connection.execute(text("SET LOCAL statement_timeout = '120s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": ADVISORY_LOCK})
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with create_engine(Settings().database.owner_url.get_secret_value()).connect() as connection:
        run(connection)
