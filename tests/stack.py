"""The whole embedded stack on the tiny base, as `tunesmith up` starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.core.storage import Storage
from bench.chaos.house import open_s3
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded.state import State

COMMAND = (sys.executable, "-m", "cli.main")


@dataclass(frozen=True)
class Stack:
    """A running `tunesmith up`."""

    process: "subprocess.Popen[bytes]"
    data_dir: Path
    base_url: str
    api_key: str

    def children(self, *words: str) -> list[psutil.Process]:
        """Its processes whose command line holds all these words."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in found if all(word in command_of(child) for word in words)]

    def storage(self) -> Storage:
        return open_s3(State.load(self.data_dir / "stack.json"))


@contextmanager
def running_stack(
    data_dir: Path,
    bases_dir: Path,
    *,
    command: Sequence[str | Path] = COMMAND,
    environment: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> Iterator[Stack]:
    """Up until the block ends, on a free port, with leases that are given up after seconds."""
    settings = {
        "TUNESMITH_INFERENCE__BASE": make.TINY,
        "TUNESMITH_TRAINING__WARM_BASE": make.TINY,
        "TUNESMITH_CACHE_DIR": str(bases_dir),
        "TUNESMITH_LEASES__LEASE_SECONDS": "6",
        "TUNESMITH_LEASES__HEARTBEAT_SECONDS": "1",
        **make.UNHURRIED,
    }
    arguments = ["up", "--data-dir", str(data_dir), "--port", str(make.free_port())]
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "console").open("w") as console:
        process = subprocess.Popen(
            [*command, *arguments], env={**environment, **settings}, cwd=cwd, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            credentials = data_dir / "credentials.json"
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not credentials.exists():
                assert process.poll() is None and time.monotonic() < deadline, (data_dir / "console").read_text()[-5000:]
                time.sleep(0.1)
            yield Stack(process, data_dir, **json.loads(credentials.read_text()))
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=PATIENCE_SECONDS) == 0


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return ""
