"""Room for a few at once, in a process of the API whose threads are few: what takes a core and memory of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from app.core.errors import Unavailable

AT_ONCE, MOST_WAITING, PATIENCE_SECONDS = 2, 4, 5.0


class Places:
    """A few work at once, one of an organization, and a few more may wait. `what` and `code` are for who finds no place."""

    def __init__(self, what: str, *, code: str) -> None:
        self._what, self._code = what, code
        self._changed, self._at_work, self._waiting = Condition(), set[str](), 0

    @contextmanager
    def take(self, organization_id: str) -> Iterator[None]:
        """Raises Unavailable."""
        with self._changed:
            if self._waiting == MOST_WAITING:
                raise self._busy()
            self._waiting += 1
            is_free = self._changed.wait_for(lambda: self._is_free(organization_id), PATIENCE_SECONDS)
            self._waiting -= 1
            if not is_free:
                raise self._busy()
            self._at_work.add(organization_id)
        try:
            yield
        finally:
            with self._changed:
                self._at_work.discard(organization_id)
                self._changed.notify_all()

    def _busy(self) -> Unavailable:
        return Unavailable(f"too many {self._what} at once; try again shortly", code=self._code)

    def _is_free(self, organization_id: str) -> bool:
        return len(self._at_work) < AT_ONCE and organization_id not in self._at_work
