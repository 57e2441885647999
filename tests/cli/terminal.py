"""A person at a terminal: a process that has one, what it shows, and what is typed."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.embedded.patience import PATIENCE_SECONDS, eventually

ROOT = Path(__file__).parents[2]


class Terminal:
    """Of 120 columns."""

    def __init__(self, *arguments: str) -> None:
        self._end, theirs = pty.openpty()
        environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
        command = [sys.executable, "-m", "cli.main", *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,  # noqa: PLW1509 - nothing here holds a lock that it takes
        )
        os.close(theirs)
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def seen(self) -> str:
        return self._seen.decode(errors="replace")

    def shows(self, words: str) -> None:
        """Return once it does."""
        eventually(lambda: words in self.seen)

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def status(self) -> int:
        """Once the command has ended."""
        status = self._process.wait(timeout=PATIENCE_SECONDS)
        self._reader.join()
        return status

    def close(self) -> None:
        self._process.kill()
        self.status()
        os.close(self._end)

    def _read(self) -> None:
        while True:
            try:
                self._seen.extend(os.read(self._end, 65536))
            except OSError:  # it has ended
                return


def _hear_interrupts() -> None:
    """A shell starts what it sends to the background deaf to Ctrl-C, and tests that run there hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()
