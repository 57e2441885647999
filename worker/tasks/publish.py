"""Bases' cards in storage, where the API renders from: of one as its first job comes, of all when a cpu worker starts."""

import threading
from functools import cache
from pathlib import Path

import structlog

from app.core import tiers
from app.core.catalog import Base
from app.core.errors import Unavailable
from worker.model import card
from worker.model.source import BaseRefused
from worker.services import Services

log = structlog.get_logger()
_publish = cache(card.publish)  # once for a worker


def publish(to: Services, base: Base) -> Path:
    """The base's card on this machine, and in storage. Raises BaseRefused, Unavailable."""
    written = card.prepared(base, to.settings.cache_dir)
    _publish(to.storage, base.id, written)
    return written


def publish_all(to: Services) -> None:
    """Every base that some worker here holds: a dry run asks for it before any job has. One that cannot be had is in the log."""
    for base in to.catalog.values():
        if tiers.holding(base, to.settings.training.tiers):
            try:
                publish(to, base)
            except (BaseRefused, Unavailable, OSError) as error:
                log.warning("card_not_published", base=base.id, reason=str(error))


def begin(to: Services) -> None:
    """The same beside whatever else this process does: a hub may be slow."""
    threading.Thread(target=publish_all, args=(to,), name="publish", daemon=True).start()
