import gc
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bench.chaos.machine import is_alive
from cli.main import main
from migrations.upgrade import upgrade
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.stack import command_of
from worker.embedded import Servers, stack
from worker.embedded.paths import hold
from worker.embedded.state import State, usable_ports

STOP_SECONDS = PATIENCE_SECONDS


class Up:
    def __init__(self, data_dir: Path, port: int) -> None:
        command = [sys.executable, "-m", "tests.embedded.up_with_fakes", str(data_dir), str(port)]
        self._credentials = data_dir / "credentials.json"
        self.ready_lines = ""
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read_until(self, pattern: str) -> str:
        seen = ""
        for line in self.process.stdout:
            seen += line
            if re.search(pattern, line):
                return seen
        raise AssertionError(f"{pattern!r} was never said:\n{seen}")

    def credentials(self) -> dict[str, str]:
        assert stat.S_IMODE(self._credentials.stat().st_mode) == 0o600
        return json.loads(self._credentials.read_text())

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=STOP_SECONDS)
        return self.process.returncode, output


@contextmanager
def ready(data_dir: Path, port: int) -> Iterator[Up]:
    up = Up(data_dir, port)
    try:
        up.ready_lines = up.read_until("to stop")
        yield up
    finally:
        if up.process.poll() is None:
            up.end(signal.SIGINT)
        up.process.stdout.close()


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(map(is_alive, processes))


def test_the_life_of_a_stack(tmp_path: Path) -> None:
    """One story, since every start takes seconds: begin, be killed, go on with the same key, be stopped."""
    data_dir, port = tmp_path / "data", usable_ports(None).s3
    with ready(data_dir, port) as up:
        credentials = up.credentials()
        assert credentials["base_url"] == f"http://127.0.0.1:{port}/v1"
        assert credentials["api_key"].startswith("ts-")
        assert f"tunesmith |   API          {credentials['base_url']}\n" in up.ready_lines
        children = up.children()
        next(child for child in children if "engine" in command_of(child)).kill()
        up.read_until("engine was ended by SIGKILL")
        eventually(lambda: any("engine" in command_of(child) for child in up.children()))
        children += up.children()
        up.end(signal.SIGKILL)

    with ready(data_dir, port) as up:  # at once, while Postgres may still be shutting itself down
        assert are_gone(children)
        assert up.credentials() == credentials
        children = up.children()
        status, said = up.end(signal.SIGTERM)
    assert (status, are_gone(children)) == (0, True)
    assert "stopping" in said
    assert not (data_dir / "credentials.json").exists()


@pytest.fixture
def forgotten_pools() -> Iterator[None]:
    """`ensure_first_key` leaves its connection to the garbage collector, which warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("forgotten_pools")
def test_a_key_that_only_the_database_remembers_is_replaced(running: Servers) -> None:
    upgrade(running.settings.database.owner_url.get_secret_value())
    stack.ensure_key(running)
    first = running.state.api_key
    stack.ensure_key(running)
    assert running.state.api_key == first
    # as if killed between the database's commit and the writing of stack.json
    running.state = running.state.model_copy(update={"api_key": None})
    stack.ensure_key(running)

    assert running.state.api_key not in (None, first)
    assert State.load(running.paths.state) == running.state


def test_a_second_up_on_a_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(tmp_path / "lock"):
        status = main(["up", "--data-dir", str(tmp_path), "--port", "1024"])

    said = f"tunesmith: {tmp_path} is in use by a running stack (process {os.getpid()}); stop it first\n"
    assert (status, capsys.readouterr().err) == (1, said)


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = main(["up", "--data-dir", str(tmp_path), "--port", str(port)])

    said = f"tunesmith: 127.0.0.1:{port} is taken or not ours to use; choose another port with --port\n"
    assert (status, capsys.readouterr().err) == (1, said)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TRAINING__TIERS", "cpu"),
        ("TRAINING__TIERS", "16"),
        ("LIMITS__FILE_BYTES", "abc"),
        ("WEBHOOKS", "x"),
        ("SECRETS_DIR", "/nope"),
        ("CONFIG_FILE", __file__),
        ("CATALOG_FILE", "/nope"),
        ("INFERENCE__BASE", "nope"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    monkeypatch.setenv(f"TUNESMITH_{variable}", value)
    status = main(["up", "--data-dir", str(tmp_path / "data"), "--port", "1024"])

    said = capsys.readouterr().err
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("tunesmith: ") and f"TUNESMITH_{variable}" in said
    assert not (tmp_path / "data").exists()


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "Run the whole service on this machine" in capsys.readouterr().out


def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--port", "99999"]) == 2
    assert "'--port': Input should be less than or equal to 65535" in capsys.readouterr().err


@pytest.fixture
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATABASE__OWNER_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")


@pytest.mark.usefixtures("no_database")
def test_migrating_without_a_database_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["migrate", "--wait", "0"])
    said = capsys.readouterr().err
    assert status == 1
    assert said.startswith("tunesmith: the database does not answer or refuses: ")
    assert said.count("\n") == 1
