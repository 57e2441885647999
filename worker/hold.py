"""Work in hand that has no lease of its own: others keep away from it for as long as somebody works on it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog
from sqlalchemy import orm

from app import db
from worker.services import Services

log = structlog.get_logger()


class Extend(Protocol):
    """Keeps it from others for so long from now on."""

    def __call__(self, session: orm.Session, *, lease_seconds: float) -> None: ...


@contextmanager
def held(to: Services, extend: Extend) -> Iterator[None]:
    """Say so again with every heartbeat. If this process dies, another takes the work after a lease, however large it is."""
    is_over, leases = threading.Event(), to.settings.leases

    def beat() -> None:
        while not is_over.wait(leases.heartbeat_seconds):
            try:
                with to.in_hand.keeping(), to.sessions.begin() as session:
                    extend(session, lease_seconds=leases.lease_seconds)
            except Exception as error:  # whatever it was, the next beat may do
                say = log.warning if db.is_outage(error) else log.error
                say("hold_not_extended", error=f"{type(error).__name__}: {error}"[:300])

    thread = threading.Thread(target=beat, name="hold")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
