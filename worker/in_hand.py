"""What a cpu worker has claimed and not yet said its last word on. Told to go, it finishes that, or gives it back."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy import orm

from app import outbox
from app.files.service import CPU_QUEUE

log = structlog.get_logger()

FINISH_SECONDS = 10.0  # shorter than any grace
GiveBack = Callable[[orm.Session], None]


class InHand:
    """One thing at a time, since a worker does one. `is_leaving`: it is the last."""

    def __init__(self) -> None:
        self.is_leaving = False
        self._give_back: GiveBack | None = None
        self._lock = threading.Lock()

    @contextmanager
    def holding(self, give_back: GiveBack) -> Iterator[None]:
        """Until the block ends, `give_back` is how another worker may have it at once."""
        with self._lock:
            self._give_back = give_back
        try:
            yield
        finally:
            with self._lock:
                self._give_back = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Meanwhile nothing is given back, and once it was nobody comes here: a word that it is worked on still must not be said
        after the one that it is free."""
        with self._lock:
            yield

    def leave(self, sessions: orm.sessionmaker[orm.Session]) -> None:
        """Begin nothing more. What is not done in a while is given back, and the process ends: nobody waits for its work."""
        self.is_leaving = True
        timer = threading.Timer(FINISH_SECONDS, self._abandon, (sessions,))
        timer.daemon = True
        timer.start()

    def _abandon(self, sessions: orm.sessionmaker[orm.Session]) -> None:
        with self._lock:
            if self._give_back is None:
                return
            try:
                with sessions.begin() as session:
                    self._give_back(session)
                    outbox.ring(session, CPU_QUEUE)
            except Exception as error:  # a database that is away: whoever comes next waits until this worker must be dead
                log.warning("not_given_back", error=type(error).__name__)
                return
            log.info("given_back")
            os._exit(0)
