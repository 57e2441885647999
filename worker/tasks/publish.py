"""Bases' cards in storage, where the API renders from: of one as its first job comes, of all when a cpu worker starts."""

import threading
import time
from functools import cache
from pathlib import Path

import structlog

from app.core import tiers
from app.core.catalog import Base
from worker.model import card
from worker.services import Services

log = structlog.get_logger()
PAUSES_SECONDS = (5, 30, 60, 300, *(1800 for _ in range(48)))  # a day
_publish = cache(card.publish)  # once for a worker


def publish(to: Services, base: Base) -> Path:
    """The base's card on this machine, and in storage. Raises BaseRefused, Unavailable."""
    written = card.prepared(base, to.settings.cache_dir)
    _publish(to.storage, base.id, written)
    return written


def publish_all(to: Services) -> list[Base]:
    """Every base that some worker here holds: a dry run asks for it before any job has. Returns those that cannot be had now."""
    return [
        base for base in to.catalog.values() if tiers.holding(base, to.settings.training.tiers) and not _is_published(to, base)
    ]


def _is_published(to: Services, base: Base) -> bool:
    try:
        publish(to, base)
    except Exception as error:  # a hub or storage that is away, a gated base, a broken file: others are not to miss theirs
        log.warning("card_not_published", base=base.id, reason=str(error) or type(error).__name__)
        return False
    return True


def begin(to: Services) -> None:
    """The same beside whatever else this process does, again and again until all are there: a hub may be slow, or away."""
    threading.Thread(target=_until_all_are, args=(to,), name="publish", daemon=True).start()


def _until_all_are(to: Services) -> None:
    for pause_seconds in PAUSES_SECONDS:
        if not publish_all(to):
            return
        time.sleep(pause_seconds)
