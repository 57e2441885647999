"""Child processes that are kept running, and that never outlive us."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from worker.embedded.errors import StackError
from worker.embedded.output import Output

LOOK_SECONDS = 0.1
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
HEALTHY_SECONDS = 60.0  # who has lived that long starts again without having to wait for past failures
DEATHS_TO_GIVE_UP = 4  # while somebody waits for the first answer
PR_SET_PDEATHSIG = 1

Failures = tuple[type[Exception], ...]

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Program:
    """One process that is to run for as long as the stack does. `environment` is all that it gets.

    `prepare` runs before every start. `orphan_signal` is what it gets from the kernel should we be killed.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: Path
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    orphan_signal: signal.Signals = signal.SIGKILL
    grace_seconds: float = 5.0
    prepare: Callable[[], None] | None = None


class Supervisor:
    """Starts programs in groups, restarts those that die, stops the groups in reverse order.

    One thread starts everything: the kernel ends a child when the *thread* that started it is gone, and this one lasts.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._groups: list[list[_Child]] = []
        self._lock = threading.Lock()
        self._wake, self._is_hurried, self._is_over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self, *programs: Program) -> None:
        """Start a group and keep it running. Returns at once: `wait_for` knows when they answer."""
        with self._lock:
            self._groups.append([_Child(program, self._output) for program in programs])
        if not self._thread.is_alive():
            self._thread.start()
        self._wake.set()

    def wait_for(
        self,
        name: str,
        ask: Callable[[], object],
        *,
        failures: Failures,
        seconds: float,
        pause_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Return when `ask` raises none of `failures` any more.

        Raises StackError if that takes too long, or if a child of the last group dies again and again.
        """
        give_up_at = time.monotonic() + seconds
        while True:
            try:
                ask()
                return
            except failures as error:
                self._require_lasting()
                if time.monotonic() > give_up_at:
                    reason = f"{name} did not answer within {seconds:.0f} s ({error})"
                    raise StackError(f"{reason}; its log is {self._output.path(name)}") from error
            time.sleep(pause_seconds)

    def stop(self) -> None:
        """Stop everything, the last group first. Each process is asked, and killed when its grace is over."""
        while self._groups:
            with self._lock:  # once out of the list, nobody restarts them
                group = self._groups.pop()
            self._stop(group)
        self._is_over.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def hurry(self) -> None:
        """Let `stop` kill instead of wait. Safe to call from a signal handler."""
        self._is_hurried.set()

    def pids(self) -> dict[str, int]:
        """Who runs just now."""
        with self._lock:
            return {child.name: child.pid for group in self._groups for child in group if child.pid is not None}

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._lock:
                for child in (child for group in self._groups for child in group):
                    child.tend()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()

    def _require_lasting(self) -> None:
        with self._lock:
            dying = [child for child in self._groups[-1] if child.deaths >= DEATHS_TO_GIVE_UP]
        for child in dying:
            last_line, log = self._output.last_line(child.name), self._output.path(child.name)
            raise StackError(f"{child.name} does not stay up: {last_line!r}; its log is {log}")

    def _stop(self, group: "list[_Child]") -> None:
        asked_at = time.monotonic()
        for child in group:
            child.ask_to_stop()
        while running := [child for child in group if child.is_running()]:
            for child in running:
                if self._is_hurried.is_set() or time.monotonic() > asked_at + child.grace_seconds:
                    child.kill()
            time.sleep(LOOK_SECONDS / 4)
        for child in group:
            child.close()


class _Child:
    """One program and the process that it is just now. Only the supervisor's thread calls `tend`."""

    def __init__(self, program: Program, output: Output) -> None:
        self.name, self.grace_seconds, self.deaths = program.name, program.grace_seconds, 0
        self._program, self._output = program, output
        self._process: subprocess.Popen[bytes] | None = None
        self._pump: threading.Thread | None = None
        self._started_at, self._due_at = 0.0, 0.0
        self._pause_seconds = FIRST_PAUSE_SECONDS

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def tend(self) -> None:
        """Start it when that is due; notice that it has died."""
        if self._process is None:
            if time.monotonic() >= self._due_at:
                self._start()
        elif (status := self._process.poll()) is not None:
            self.close()
            self._put_off(_ending(status))

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(self._program.stop_signal)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """With all that it started and that stayed in its group."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Forget a process that has ended, and end what it left behind."""
        if self._process is not None and self._pump is not None:
            self.kill()
            self._pump.join(timeout=1)
            self._process = None

    def _start(self) -> None:
        self._started_at = time.monotonic()
        try:
            if self._program.prepare is not None:
                self._program.prepare()
            self._process = _spawn(self._program)
        except (OSError, subprocess.SubprocessError, StackError) as error:
            self._put_off(f"could not start ({error})")
            return
        assert self._process.stdout is not None  # a pipe was asked for
        self._pump = threading.Thread(target=self._output.pump, args=(self.name, self._process.stdout), daemon=True)
        self._pump.start()

    def _put_off(self, what: str) -> None:
        lived_seconds = time.monotonic() - self._started_at
        if lived_seconds >= HEALTHY_SECONDS:
            self.deaths, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        self.deaths += 1
        self._due_at = time.monotonic() + self._pause_seconds
        next_start = f"starting it again in {self._pause_seconds:g} s"
        self._output.say(f"{self.name} {what} after {lived_seconds:.1f} s; {next_start}")
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)


@contextmanager
def signals(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on Ctrl-C, SIGTERM and a closed terminal (unless nohup has it ignored). Main thread only."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda _number, _frame: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _spawn(program: Program) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        program.command,
        env=program.environment,
        cwd=program.cwd,
        user=program.user,
        group=program.user,
        extra_groups=None if program.user is None else (),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal is for us; we stop them in order
        umask=0o077,
        # it runs after the change of user, which would undo it, and does nothing that another thread's lock could block
        preexec_fn=_leash(program.orphan_signal),  # noqa: PLW1509
    )


def _leash(orphan_signal: signal.Signals) -> Callable[[], None] | None:
    """For the child to call before it becomes the program: it gets `orphan_signal` when we are gone (Linux only)."""
    if _libc is None:
        return None
    prctl, number, parent = _libc.prctl, int(orphan_signal), os.getpid()

    def leash() -> None:
        prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # we died before the leash was on
            os._exit(1)

    return leash


def _ending(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
