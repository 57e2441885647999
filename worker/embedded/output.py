"""Where the children's lines go: a file for each, and the console with the name in front."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO

from worker.embedded.paths import PRIVATE_FILE

OURS = "tunesmith"
NAME_WIDTH = len(OURS)
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95)
LONGEST_LINE_BYTES = 64 * 1024
LARGEST_LOG_BYTES = 32 * 1024 * 1024


class Output:
    """Safe to use from many threads. A console that goes away is no reason to stop."""

    def __init__(self, folder: Path, console: TextIO | None) -> None:
        self._folder, self._console = folder, console
        self._has_colours = console is not None and console.isatty() and "NO_COLOR" not in os.environ
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """A line of our own, with the time in the file."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._lock:
            self._log(OURS).write(f"{stamp} {text}\n".encode())
            self._show(OURS, text)

    def pump(self, name: str, pipe: IO[bytes]) -> None:
        """Copy lines until the last holder of the pipe's other end is gone."""
        with pipe:
            while line := pipe.readline(LONGEST_LINE_BYTES):
                with self._lock:
                    self._log(name).write(line if line.endswith(b"\n") else line + b"\n")
                    self._show(name, line.decode(errors="replace").rstrip())

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def last_line(self, name: str) -> str:
        with self._lock:
            log = self._logs.get(name)
            return log.last_line.decode(errors="replace").strip() if log else ""

    def close(self) -> None:
        with self._lock:
            for log in self._logs.values():
                log.close()
            self._logs.clear()

    def _log(self, name: str) -> "_Log":
        if name not in self._logs:
            self._logs[name] = _Log(self.path(name))
        return self._logs[name]

    def _show(self, name: str, text: str) -> None:
        if self._console is None:
            return
        try:
            latest = text.rsplit("\r", 1)[-1]  # of a progress bar only how it ended
            self._console.write(f"{self._prefix(name)} {latest}\n")
            self._console.flush()
        except (OSError, ValueError):  # `tunesmith up | head`
            self._console = None

    def _prefix(self, name: str) -> str:
        padded = f"{name:<{NAME_WIDTH}} |"
        if not self._has_colours:
            return padded
        colour = 1 if name == OURS else COLOURS[list(self._logs).index(name) % len(COLOURS)]
        return f"\x1b[{colour}m{padded}\x1b[0m"


class _Log:
    """A file that is moved aside, for one successor, when it has grown large."""

    def __init__(self, path: Path) -> None:
        self._path, self.last_line = path, b""
        self._file = self._open()

    def write(self, line: bytes) -> None:
        self.last_line = line
        with suppress(OSError):  # a full disk costs lines; a child whose lines nobody took would stand still
            if self._file.tell() > LARGEST_LOG_BYTES:
                self._file.close()
                self._path.replace(self._path.with_suffix(".log.1"))
                self._file = self._open()
            self._file.write(line)

    def close(self) -> None:
        self._file.close()

    def _open(self) -> IO[bytes]:
        # unbuffered: who reads a log wants the last line before the end
        return os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE), "ab", buffering=0)
