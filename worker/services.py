"""What tasks of one worker process share: opened at first use, since a forked child must not inherit connections."""

from dataclasses import dataclass, field
from functools import cache

from sqlalchemy import orm

from app import db
from app.core import catalog, storage
from app.core.settings import Settings
from worker.in_hand import InHand
from worker.metrics import WorkerMetrics


@dataclass(frozen=True)
class Services:
    settings: Settings
    sessions: orm.sessionmaker[orm.Session]
    storage: storage.Storage
    catalog: catalog.Catalog
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    in_hand: InHand = field(default_factory=InHand)


def open_services(settings: Settings, *, sits_storage_out: bool = True) -> Services:
    """Connected as the system role: a worker serves every organization."""
    return Services(
        settings=settings,
        sessions=db.open_sessions(settings.database.system_url, pool_size=4),
        storage=storage.open_storage(settings.storage, for_requests=not sits_storage_out),
        catalog=catalog.load(settings.catalog_file),
    )


@cache
def services() -> Services:
    """This process's own."""
    return open_services(Settings())
