"""One of our modules in a process of its own, which the kernel ends when it takes more than it was given.

What strangers wrote is worked on there: the worst file costs a process, not the worker.
"""

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys

OUT_OF_MEMORY = 3  # the exit status
_PR_SET_PDEATHSIG = 1
_MOST_THREADS = 8
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|_URL$|_URI$|_DSN$|PROXY")


class TookTooMuch(Exception):
    """It was ended for what it took. The message says what, and how much it had been given."""


class Died(RuntimeError):
    """It ended in another way; its last words are in the message, which is for the log."""


class TimedOut(Died):
    """It was ended because nobody waits longer: the file may be too much, or the machine too busy."""


def run(module: str, order: str, *, memory_bytes: int, cpu_seconds: int, wall_seconds: float) -> str:
    """Run `python -m module`, which calls `accept`, with `order` on its stdin. Returns its stdout.

    Raises TookTooMuch, TimedOut, Died.
    """
    command = [sys.executable, "-m", module, str(memory_bytes), str(cpu_seconds)]
    process = subprocess.Popen(  # no signal that is meant for this process reaches it
        command,
        env=environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        said, complaints = process.communicate(order, timeout=wall_seconds)
    except BaseException as error:
        process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimedOut(f"{module} took more than {wall_seconds:.0f} seconds") from None
        raise
    status = process.returncode
    if status == 0:
        return said
    if status in (OUT_OF_MEMORY, -signal.SIGABRT):  # libraries in Rust and C++ abort where Python raises MemoryError
        raise TookTooMuch(f"more than {memory_bytes >> 20} MiB of memory")
    if status == -signal.SIGXCPU:
        raise TookTooMuch(f"more than {cpu_seconds} seconds of processor time")
    last_words = complaints.strip().rpartition("\n")[2].partition(":")[0]  # an exception's message may quote a customer
    raise Died(f"{module} ended with {status}: {last_words}")


def accept() -> str:
    """In the process itself: take the limits, die with whoever started it, and read the order."""
    memory_bytes, cpu_seconds = map(int, sys.argv[1:])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))  # first SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))  # what is written to, not what is merely reserved
    return sys.stdin.read()


def environment() -> dict[str, str]:
    """This process's without any secret. Threads are few, since each takes memory, and what is large is given back at once."""
    from app.core.settings import PREFIX  # the process itself has no settings, and does not load what reads them

    names = {name: name.upper() for name in os.environ}
    kept = {name: os.environ[name] for name, upper in names.items() if not (upper.startswith(PREFIX) or _SECRET.search(upper))}
    return {
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": str(min(_MOST_THREADS, len(os.sched_getaffinity(0)))),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # a fixed one: else glibc keeps ever larger pieces for itself
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
        **kept,
    }
