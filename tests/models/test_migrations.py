from collections.abc import Iterator

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from app.core.settings import Settings
from app.models import Table
from migrations.upgrade import configuration, upgrade
from worker.embedded import Servers
from worker.embedded.roles import Passwords, ensure_database


@pytest.fixture
def empty_database(servers: Servers) -> Iterator[str]:
    """The owner's URL of a database without tables."""
    state, name = servers.state, "tunesmith_migrations"
    with psycopg.connect(servers.superuser_dsn, autocommit=True) as superuser:
        passwords = Passwords(state.owner_password, state.api_password, state.system_password)
        ensure_database(superuser, passwords, database=name)
        yield servers.settings.database.owner_url.get_secret_value().rpartition("/")[0] + f"/{name}"
        superuser.execute(f"DROP DATABASE {name}")


def test_the_migrations_make_what_the_models_say(settings: Settings) -> None:
    engine = create_engine(settings.database.owner_url.get_secret_value())
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        differences = compare_metadata(context, Table.metadata)
    engine.dispose()

    assert differences == []


def test_migrations_go_up_down_and_up_again(empty_database: str) -> None:
    upgrade(empty_database)
    upgrade(empty_database)  # a second time does nothing
    engine = create_engine(empty_database)
    with engine.connect() as connection:
        command.downgrade(configuration(connection), "base")
    with engine.connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
    engine.dispose()

    assert tables == ["alembic_version"]
    upgrade(empty_database)
