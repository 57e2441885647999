"""The connection to the broker, as Celery holds it, and when the broker last answered there.

A consumer may fall silent after a reconnect and look well in every other way: its process runs, its connection stands.
"""

import time
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as redis_transport


class Polls:
    """When the broker last answered this process. A worker with a job in hand does not ask for another."""

    def __init__(self) -> None:
        self._answered_at = time.monotonic()
        self._looks = 0

    def answered(self) -> None:
        self._answered_at = time.monotonic()

    def look_begins(self) -> None:
        self._looks += 1

    def look_ends(self) -> None:
        self._looks -= 1
        self.answered()

    @property
    def silent_seconds(self) -> float:
        """0 while a look is at work, since nobody asks then."""
        return 0.0 if self._looks else time.monotonic() - self._answered_at


polls = Polls()  # Celery makes transports itself, and has one app in a process


class Channel(redis_transport.Channel):  # type: ignore[misc]  # kombu has no types
    """Redis's, that notes every answer to a poll: an empty one comes each second."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            read = super()._brpop_read(**options)
        except Empty:
            polls.answered()
            raise
        polls.answered()
        return read


class Transport(redis_transport.Transport):  # type: ignore[misc]
    Channel = Channel


def watch() -> None:
    """Let Celery use the transport above for the schemes of Redis. By name, since its URL chooses, with TLS or without."""
    TRANSPORT_ALIASES.update(redis=f"{__name__}:Transport", rediss=f"{__name__}:Transport")
