"""Waiting in tests: for what happens in other processes, and no longer than that takes."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 200.0  # three workers, slow cores: a trainer alone may take forty to start


def eventually(is_so: Callable[[], object]) -> None:
    """Return when `is_so` is truthy; fail if it never is. An OSError counts as not yet."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not _holds(is_so):
        assert time.monotonic() < give_up_at, f"never came true: {is_so}"
        time.sleep(0.02)


def _holds(is_so: Callable[[], object]) -> bool:
    try:
        return bool(is_so())
    except OSError:
        return False
