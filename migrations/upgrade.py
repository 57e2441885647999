"""Migrations from code: the command, the embedded stack and the tests all come through here."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, create_engine


def upgrade(owner_url: str, revision: str = "head") -> None:
    """Bring the database to `revision` as its owner."""
    engine = create_engine(owner_url)
    try:
        with engine.connect() as connection:
            command.upgrade(configuration(connection), revision)
    finally:
        engine.dispose()


def configuration(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
