import json
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.embedded.patience import eventually
from worker.embedded.state import usable_ports

READY_SECONDS = 60


class Up:
    """One `up` with fake processes of ours, real servers and the real schema."""

    def __init__(self, data_dir: Path, port: int) -> None:
        self.credentials = data_dir / "credentials.json"
        command = [sys.executable, "-m", "tests.embedded.fake_service", "up", str(data_dir), str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def read_until(self, pattern: str) -> str:
        seen = ""
        for line in self.process.stdout:
            seen += line
            if re.search(pattern, line):
                return seen
        raise AssertionError(f"{pattern!r} was never said:\n{seen}{self.process.stderr.read()}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=READY_SECONDS)
        return self.process.returncode, output + errors


@pytest.fixture(scope="module")
def port() -> int:
    return usable_ports(None).s3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept from test to test: each continues what the one before left."""
    return tmp_path_factory.mktemp("up") / "data"


@pytest.fixture
def up(data_dir: Path, port: int) -> Iterator[Up]:
    up = Up(data_dir, port)
    yield up
    if up.process.poll() is None:
        up.end(signal.SIGINT)
    up.process.stdout.close()
    up.process.stderr.close()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if p.is_running())


def test_credentials_mean_ready_and_the_key_lasts(up: Up, data_dir: Path, port: int) -> None:
    said = up.read_until("to stop")
    assert f"tunesmith |   API          http://127.0.0.1:{port}/v1" in said
    credentials = json.loads(up.credentials.read_text())
    assert stat.S_IMODE(up.credentials.stat().st_mode) == 0o600
    assert credentials["base_url"] == f"http://127.0.0.1:{port}/v1"
    assert credentials["api_key"].startswith("ts-")
    children = up.children()
    status, said = up.end(signal.SIGTERM)

    assert status == 0
    assert "stopping" in said
    assert gone(children)
    assert not up.credentials.exists()

    again = Up(data_dir, port)
    again.read_until("to stop")
    assert json.loads(up.credentials.read_text()) == credentials
    again.end(signal.SIGINT)


def test_a_killed_up_leaves_nothing_that_hinders_the_next(up: Up, data_dir: Path, port: int) -> None:
    up.read_until("to stop")
    key = json.loads(up.credentials.read_text())["api_key"]
    children = up.children()
    up.end(signal.SIGKILL)
    again = Up(data_dir, port)
    again.read_until("to stop")

    assert gone(children)
    assert json.loads(up.credentials.read_text())["api_key"] == key
    again.end(signal.SIGINT)


def test_a_key_that_only_the_database_remembers_is_replaced(data_dir: Path, port: int) -> None:
    memory = data_dir / "stack.json"
    remembered = json.loads(memory.read_text())
    memory.write_text(json.dumps(remembered | {"api_key": None}))
    up = Up(data_dir, port)
    up.read_until("to stop")

    assert json.loads(up.credentials.read_text())["api_key"] not in (None, remembered["api_key"])
    up.end(signal.SIGINT)


def test_one_directory_has_one_up(up: Up, data_dir: Path, port: int) -> None:
    up.read_until("to stop")
    second = Up(data_dir, port)
    status, said = second.end(signal.SIGCONT)

    assert status == 1
    assert said == f"tunesmith: {data_dir} is in use by a running stack (process {up.process.pid}); stop it first\n"
    assert up.credentials.exists()


def test_a_dead_process_is_started_again(up: Up) -> None:
    up.read_until("to stop")
    engine = next(child for child in up.children() if "engine" in child.cmdline())
    engine.kill()
    up.read_until("engine was ended by SIGKILL")
    eventually(lambda: any("engine" in child.cmdline() for child in up.children()))


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = Up(tmp_path, port).end(signal.SIGCONT)

    assert status == 1
    assert said == f"tunesmith: 127.0.0.1:{port} is taken or not ours to use; choose another port with --port\n"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
