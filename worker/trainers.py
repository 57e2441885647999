"""Trainer processes as their supervisor holds them: warmed up before the job is there, one job each, never shared."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import structlog
from pydantic import ValidationError

from app.core import events
from app.core.settings import PREFIX, Settings
from worker import wire

log = structlog.get_logger()

PROGRAM = "worker.trainer"  # bench/chaos puts one without torch in its place
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # for the heap that workspace.keep_pages keeps
READY_SECONDS = 3600.0  # a first start may fetch the base and quantize it
POLL_SECONDS = 0.5  # so soon a cancel, a drain or a lost lease is seen


class TrainerDied(RuntimeError):
    """The process ended without saying how its run ended."""


class Trainer:
    """One trainer process. Its events are read by a thread of its own, so that waiting for them can end."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"trainer-{process.pid}", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, check: Callable[[], None]) -> None:
        """Until it is warm. Raises TrainerDied, and what `check` raises when nobody wants it any more."""
        give_up_at = time.monotonic() + READY_SECONDS
        while (line := self._next_line(POLL_SECONDS)) is None and time.monotonic() < give_up_at:
            check()
        if line != wire.READY:
            self.kill()
            raise TrainerDied("the trainer did not get ready; its log says why")

    def start(self, job: wire.TrainerJob) -> None:
        self._send(job.model_dump_json().encode() + b"\n")

    def stop(self) -> None:
        """Ask for a checkpoint and an end."""
        self._send(wire.STOP)

    def next_event(self, timeout_seconds: float) -> events.Event | None:
        """What it says next; None when it says nothing for so long. Raises TrainerDied at the end of its words."""
        line = self._next_line(timeout_seconds)
        if line is None:
            return None
        try:
            return events.parse(line)
        except ValidationError:
            raise TrainerDied("the trainer spoke out of turn") from None

    def kill(self) -> None:
        """End it at once, and wait until its memory is free."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of what it was told and never read
            self._process.stdin.close()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: the reader says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _next_line(self, timeout_seconds: float) -> bytes | None:
        try:
            line = self._lines.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)  # the end stays the end
            raise TrainerDied(f"the trainer ended with status {self._process.wait()}")
        return line

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as words:
            for line in words:
                self._lines.put(line)
        self._lines.put(None)


class Bench:
    """Keeps one warm trainer waiting. All processes are started by one thread that lasts as long as the bench:
    the kernel kills a trainer when the thread that started it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="trainer-starter")
        self._waiting: Trainer | None = None
        self._lock = threading.Lock()

    def warm_up(self) -> Trainer:
        """The next trainer: the one that waits, or one that starts now."""
        with self._lock:
            if self._waiting is None or not self._waiting.is_alive:
                self._waiting = self._start()
            return self._waiting

    def take(self, check: Callable[[], None]) -> Trainer:
        """A trainer that has had no job yet. Until it is ready it stays on the bench. Raises what `Trainer.wait_ready` raises."""
        trainer = self.warm_up()
        trainer.wait_ready(check)
        with self._lock:
            self._waiting = None
        return trainer

    def close(self) -> None:
        with self._lock:
            if self._waiting is not None:
                self._waiting.kill()
                self._waiting = None
        self._starter.shutdown()

    def _start(self) -> Trainer:
        process = self._starter.submit(self._spawn).result()
        log.info("trainer_started", pid=process.pid)
        return Trainer(process)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        """It gets no secret: neither database nor storage nor broker."""
        settings = self._settings
        command = [sys.executable, "-m", PROGRAM, "--cache-dir", str(settings.cache_dir)]
        command += ["--gpu", settings.gpu.model_dump_json()]
        if settings.training.warm_base:
            command += ["--warm", settings.training.warm_base]
        if settings.catalog_file:
            command += ["--catalog", str(settings.catalog_file)]
        environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=LARGE_PAGES | environment,
            start_new_session=True,
        )
