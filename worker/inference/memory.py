"""Adapters in this machine's memory that no slot holds: checked and prepared, so that they are back at once."""

from collections import OrderedDict
from typing import Protocol


class Weights(Protocol):
    """One adapter, ready to be applied."""

    @property
    def size_bytes(self) -> int: ...


class AdapterMemory:
    """At most `max_bytes`, the least recently kept go first. It belongs to one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = OrderedDict[str, Weights]()
        self.size_bytes = self.hits = self.evictions = 0

    def __len__(self) -> int:
        return len(self._held)

    def find(self, digest: str) -> Weights | None:
        found = self._held.get(digest)
        if found is not None:
            self._held.move_to_end(digest)
            self.hits += 1
        return found

    def keep(self, digest: str, weights: Weights) -> None:
        """If it fits at all."""
        self.drop(digest)
        if weights.size_bytes > self._max_bytes:
            return
        self._held[digest] = weights
        self.size_bytes += weights.size_bytes
        while self.size_bytes > self._max_bytes:
            self.drop(next(iter(self._held)))
            self.evictions += 1

    def drop(self, digest: str) -> None:
        if (dropped := self._held.pop(digest, None)) is not None:
            self.size_bytes -= dropped.size_bytes
