"""Migrations from code: the command, the embedded stack and the tests all come through here."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine


def upgrade(owner_url: str, revision: str = "head") -> None:
    """Bring the database to `revision` as its owner."""
    engine = create_engine(owner_url)
    try:
        with engine.connect() as connection:
            command.upgrade(configuration(connection), revision)
    finally:
        engine.dispose()


def revisions(connection: Connection) -> tuple[str, str]:
    """The revision that the database is at, and the one that this code wants it to be at."""
    current = MigrationContext.configure(connection).get_current_revision()
    return current or "none", ScriptDirectory.from_config(configuration(connection)).get_current_head() or "none"


def configuration(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
