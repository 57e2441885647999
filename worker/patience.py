"""Sitting out an outage of database or storage: what has been worked out is not thrown away for it."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import orm

from app import db
from app.core.errors import Unavailable

log = structlog.get_logger()

PAUSE_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
T = TypeVar("T")


def patiently(work: Callable[[], T], *, check: Callable[[], None] = lambda: None) -> T:
    """Repeat `work` until database and storage let it, or for ten minutes. `check` raises when nobody wants it any more."""
    given_up_at = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return work()
        except (Unavailable, *db.OUTAGE) as error:
            log.warning("waiting_out_an_outage", error=type(error).__name__)
            if time.monotonic() > given_up_at:
                raise
        check()
        time.sleep(PAUSE_SECONDS)


def say(
    sessions: orm.sessionmaker[orm.Session], words: Callable[[orm.Session], T], *, check: Callable[[], None] = lambda: None
) -> T:
    """In a transaction of its own, patiently. An outage may hide that it was committed: then the words are said twice."""

    def once() -> T:
        with sessions.begin() as session:
            return words(session)

    return patiently(once, check=check)
