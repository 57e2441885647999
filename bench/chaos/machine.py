"""A machine that runs `tunesmith up` with the real trainer, and whose power can be cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from openai import OpenAI

from app.core.storage import Storage
from bench.chaos.house import ROOT, STOP_SECONDS, Stuck, eventually, open_s3, with_children
from tests.make import free_port
from worker.embedded.state import State

READY_SECONDS, GONE_SECONDS = 600.0, 30.0
LEASE_SECONDS = 6.0
TINY = "tiny-random-llama"


class Machine:
    """`client` is a customer of the stack that runs just now."""

    client: OpenAI
    _process: "subprocess.Popen[bytes]"

    def __init__(self, data_dir: Path, *, base: str, cache_dir: Path) -> None:
        self.data_dir = data_dir
        chosen = {
            "INFERENCE__BASE": base,
            "TRAINING__WARM_BASE": base,
            "CACHE_DIR": str(cache_dir),
            "LEASES__LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "LEASES__HEARTBEAT_SECONDS": "1",
        }
        self._environment = os.environ | {f"TUNESMITH_{name}": value for name, value in chosen.items()}
        if base == TINY:  # tiny products: threads would only wait for each other, and compiling would take longer than training
            self._environment |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}

    def start(self) -> None:
        """On what lies in the data directory. Returns when the stack is ready; raises Stuck if that does not come."""
        credentials, console = self.data_dir / "credentials.json", self.data_dir / "console"
        credentials.unlink(missing_ok=True)
        # another port each time: the last one may have been lent to somebody's connection
        command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(self.data_dir), "--port", str(free_port())]
        with console.open("a") as said:
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=said, stderr=subprocess.STDOUT)
        eventually(lambda: self._process.poll() is not None or credentials.exists(), "the stack is up", seconds=READY_SECONDS)
        if not credentials.exists():
            raise Stuck(console.read_text()[-3000:])
        self.client = OpenAI(**json.loads(credentials.read_text()), max_retries=5)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=STOP_SECONDS)

    def cut_power(self) -> None:
        """End every process of the stack, frozen first, so that none sees another die and does something about it."""
        frozen: list[psutil.Process] = []
        while more := [process for process in with_children([psutil.Process(self._process.pid)]) if process not in frozen]:
            for process in more:
                send(process, signal.SIGSTOP)
            frozen += more
        for process in frozen:
            send(process, signal.SIGKILL)
        self._process.wait()
        eventually(lambda: not any(map(is_alive, frozen)), "all processes are gone", seconds=GONE_SECONDS)
        self.client.close()

    def running(self, module: str) -> list[psutil.Process]:
        """The stack's processes that were started as `python -m` this."""
        return [process for process in with_children([psutil.Process(self._process.pid)]) if module in _words(process)]

    def storage(self) -> Storage:
        return open_s3(State.load(self.data_dir / "stack.json"))


@contextmanager
def machine(data_dir: Path, *, base: str, cache_dir: Path) -> Iterator[Machine]:
    """With nothing in its data directory. It is left there for whoever wants to see the logs."""
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir(parents=True)
    made = Machine(data_dir, base=base, cache_dir=cache_dir)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)  # dead, and not buried by whoever should
    return False


def send(process: psutil.Process, sent: signal.Signals) -> None:
    """Nothing to one that is gone."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(sent)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has just died
        return []
