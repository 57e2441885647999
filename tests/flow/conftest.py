"""The whole embedded stack on the tiny base, as `tunesmith up` starts it, for every test of this folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from tests import make

UP_SECONDS = 120


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
        return [child for child in found if all(word in _command(child) for word in words)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return ""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Stack]:
    data_dir = tmp_path_factory.mktemp("up")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "TUNESMITH_INFERENCE__BASE": make.TINY,
        "TUNESMITH_TRAINING__WARM_BASE": make.TINY,
        "TUNESMITH_CACHE_DIR": str(bases_dir),
        "TUNESMITH_LEASES__LEASE_SECONDS": "6",
        "TUNESMITH_LEASES__HEARTBEAT_SECONDS": "1",
    }
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", str(port)]
    with (data_dir / "console").open("w") as console:
        process = subprocess.Popen(command, env=environment, stdout=console, stderr=subprocess.STDOUT)
        credentials = data_dir / "credentials.json"
        deadline = time.monotonic() + UP_SECONDS
        while not credentials.exists():
            assert process.poll() is None and time.monotonic() < deadline, (data_dir / "console").read_text()[-5000:]
            time.sleep(0.1)
        yield Stack(process, data_dir, **json.loads(credentials.read_text()))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=stack.base_url, api_key=stack.api_key) as made:
        yield made
