import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker.embedded import StackError
from worker.embedded.output import Output
from worker.embedded.processes import Program, Supervisor, signals

FOREVER = ("sleep", "1000")


def program(name: str, *command: str, **changes: object) -> Program:
    return Program(name=name, command=command, environment={"PATH": os.environ["PATH"]}, cwd=Path("/"), **changes)


def shell(name: str, script: str, **changes: object) -> Program:
    return program(name, "sh", "-c", script, **changes)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_process_is_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(program("a", *FOREVER))
    eventually(supervisor.pids)
    first = supervisor.pids()["a"]
    os.kill(first, signal.SIGKILL)

    eventually(lambda: supervisor.pids().get("a", first) != first)
    assert "a was ended by SIGKILL after " in (tmp_path / "tunesmith.log").read_text()


def test_a_program_that_is_not_there_is_told_and_tried_again(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(program("a", "/no/such/program"), program("b", *FOREVER))
    eventually(lambda: "b" in supervisor.pids())
    assert "a could not start ([Errno 2]" in (tmp_path / "tunesmith.log").read_text()


def test_one_that_keeps_dying_waits_longer_and_is_given_up(supervisor: Supervisor, tmp_path: Path) -> None:
    def ask() -> None:
        raise ConnectionRefusedError

    supervisor.start(shell("a", "echo no licence >&2; exit 1"))
    with pytest.raises(StackError, match="a does not stay up: 'no licence'"):
        supervisor.wait_for("a", ask, failures=(OSError,), seconds=PATIENCE_SECONDS)

    deaths = (tmp_path / "tunesmith.log").read_text().splitlines()
    assert [line.rsplit("again in ")[1] for line in deaths[:4]] == ["0.5 s", "1 s", "2 s", "4 s"]
    assert all("a exited with status 1 after" in line for line in deaths)


def test_groups_are_stopped_in_reverse_order(supervisor: Supervisor, tmp_path: Path) -> None:
    script = f"trap 'echo $0 >> {tmp_path}/order; exit' TERM; echo up; while :; do sleep 0.02; done"
    for name in ("first", "second", "third"):
        supervisor.start(program(name, "sh", "-c", script, name))
        eventually((tmp_path / f"{name}.log").read_text)
    supervisor.stop()

    assert (tmp_path / "order").read_text().split() == ["third", "second", "first"]


def test_who_ignores_the_request_to_stop_is_killed_after_its_grace(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("deaf", "trap '' TERM; echo up; while :; do sleep 1; done", grace_seconds=0.3))
    eventually((tmp_path / "deaf.log").read_text)
    pid = supervisor.pids()["deaf"]
    supervisor.stop()

    assert not is_running(pid)


def test_in_a_hurry_nobody_gets_grace(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("deaf", "trap '' TERM; echo up; while :; do sleep 1; done", grace_seconds=1000))
    eventually((tmp_path / "deaf.log").read_text)
    supervisor.hurry()
    began_at = time.monotonic()
    supervisor.stop()

    assert time.monotonic() - began_at < 100


def test_what_a_dead_process_left_behind_ends_before_the_next_start(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("a", "sleep 1000 & echo $!; wait"))
    eventually((tmp_path / "a.log").read_text)
    grandchild = int((tmp_path / "a.log").read_text())
    os.kill(supervisor.pids()["a"], signal.SIGKILL)

    eventually(lambda: not is_running(grandchild))


def test_children_see_the_given_environment_only(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(shell("a", "env; exec sleep 1000"))
    eventually((tmp_path / "a.log").read_text)

    seen = {line.split("=")[0] for line in (tmp_path / "a.log").read_text().splitlines()}
    assert seen <= {"PATH", "PWD", "SHLVL", "OLDPWD", "_"}


def test_a_ctrl_c_in_the_terminal_does_not_reach_children(supervisor: Supervisor) -> None:
    supervisor.start(program("a", *FOREVER))
    eventually(supervisor.pids)

    assert os.getsid(supervisor.pids()["a"]) != os.getsid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from tests.embedded.test_processes import FOREVER, program
from worker.embedded.output import Output
from worker.embedded.processes import Supervisor
supervisor = Supervisor(Output(Path({str(tmp_path)!r}), console=None))
supervisor.start(program("a", *FOREVER))
while not (pids := supervisor.pids()):
    time.sleep(0.02)
print(pids["a"], flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    eventually(lambda: not is_running(child))


def test_lines_go_to_the_file_and_named_to_the_console(tmp_path: Path) -> None:
    console = io.StringIO()
    output = Output(tmp_path, console)
    supervisor = Supervisor(output)
    supervisor.start(shell("api", "echo one; echo two >&2; exec sleep 1000"))
    eventually(lambda: (tmp_path / "api.log").read_text() == "one\ntwo\n")
    supervisor.stop()
    output.close()

    assert console.getvalue() == "api       | one\napi       | two\n"


def test_of_a_progress_bar_the_console_shows_the_end(tmp_path: Path) -> None:
    console = io.StringIO()
    output = Output(tmp_path, console)
    output.say("10 %\r100 %")
    output.close()

    assert console.getvalue() == "tunesmith | 100 %\n"


def test_a_console_that_went_away_stops_nothing(tmp_path: Path) -> None:
    console = io.StringIO()
    output = Output(tmp_path, console)
    console.close()
    output.say("still here")
    output.close()

    assert "still here" in (tmp_path / "tunesmith.log").read_text()


def test_signals_are_handled_within_and_as_before_after() -> None:
    heard: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with signals(lambda: heard.append("stop")):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    assert heard == ["stop", "stop"]
    assert signal.getsignal(signal.SIGTERM) == before
