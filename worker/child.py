"""What makes a process a good trainer to its supervisor, whatever it trains with: how it hears, speaks, hands over and dies."""

import ctypes
import os
import queue
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from worker import wire

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """A worker that is killed with -9 cannot end its trainer; the kernel can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def claim_stdout() -> BinaryIO:
    """Our words leave by what was stdout; what libraries print goes to stderr."""
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return said


def handed_over(checkpoint: Path, to: Path) -> Path:
    """The same files under a name of the supervisor's: it deletes them once they are uploaded, the run when it has newer ones."""
    return Path(shutil.copytree(checkpoint, to / f"{checkpoint.name}-{os.getpid()}", copy_function=_link))


def _link(file: str, name: str) -> None:
    try:
        os.link(file, name)
    except OSError:  # some file systems have no links
        shutil.copyfile(file, name)


def listen(jobs: "queue.SimpleQueue[bytes]", stopping: threading.Event) -> None:
    """Hear the job and STOP; at the end of the pipe the supervisor is gone, and nobody wants the rest."""
    for line in sys.stdin.buffer:
        if line == wire.STOP:
            stopping.set()
        else:
            jobs.put(line)
    os._exit(1)
