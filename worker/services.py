"""What tasks of one worker process share: opened at first use, since a forked child must not inherit connections."""

from dataclasses import dataclass
from functools import cache

from sqlalchemy import orm

from app import db
from app.core import catalog, storage
from app.core.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    sessions: orm.sessionmaker[orm.Session]
    storage: storage.Storage
    catalog: catalog.Catalog


def open_services(settings: Settings) -> Services:
    """Connected as the system role: a worker serves every organization."""
    return Services(
        settings=settings,
        sessions=db.open_sessions(settings.database.system_url, pool_size=4),
        storage=storage.open_storage(settings.storage),
        catalog=catalog.load(settings.catalog_file),
    )


@cache
def services() -> Services:
    """This process's own."""
    return open_services(Settings())
