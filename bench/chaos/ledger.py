"""What customers were told, and what was done to the service: a file of lines, so that a run may be stopped and gone on with."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Ledger:
    """Safe for threads. Each entry is on disk before `note` returns."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]  # a run that was killed may have left half a line
            path.write_text(f"{whole}\n" if whole else "")
            self._entries = [json.loads(line) for line in whole.splitlines()]
        self._file = path.open("a")

    def note(self, kind: str, **told: Any) -> None:
        entry = {"kind": kind, **told}
        with self._lock:
            self._entries.append(entry)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        """What is known stays; nothing more is noted."""
        self._file.close()

    def all(self, kind: str) -> list[dict[str, Any]]:
        with self._lock:
            return [entry for entry in self._entries if entry["kind"] == kind]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            return iter(list(self._entries))
