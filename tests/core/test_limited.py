"""A process with limits: what it takes too much of ends it, and nobody else."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from app.core import limited
from tests.embedded.patience import PATIENCE_SECONDS


def run(order: str, *, memory_mib: int = 256, cpu_seconds: int = 20, wall_seconds: float = 60) -> str:
    return limited.run(
        "tests.core.greedy", order, memory_bytes=memory_mib << 20, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds
    )


def test_what_it_says_is_returned() -> None:
    assert run("enough") == "enough\n"


@pytest.mark.parametrize(
    ("order", "limits", "said"),
    [("memory", {}, "more than 256 MiB of memory"), ("time", {"cpu_seconds": 1}, "more than 1 seconds of processor time")],
)
def test_taking_too_much_is_told_from_dying(order: str, limits: dict[str, int], said: str) -> None:
    with pytest.raises(limited.TookTooMuch, match=said):
        run(order, **limits)


def test_its_last_words_hold_no_customers_text() -> None:
    with pytest.raises(limited.Died, match=r"ended with 1: ValueError$"):
        run("fail")


def test_one_that_waits_for_ever_is_not_waited_for() -> None:
    with pytest.raises(limited.TimedOut, match="took more than"):
        run("sleep", wall_seconds=2)


def test_no_secret_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("TUNESMITH_STORAGE__SECRET_KEY", "tunesmith_key_pepper")
    for name in (*ours, "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DATABASE_URL", "PGPASSWORD", "https_proxy"):
        monkeypatch.setenv(name, "canary")

    assert "canary" not in limited.environment().values()
    assert limited.environment()["PATH"] == os.environ["PATH"]


def test_it_dies_with_whoever_started_it() -> None:
    code = "from tests.core import test_limited; test_limited.run('sleep')"
    starter = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(starter.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    while "greedy" not in " ".join(children[0].cmdline()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # until it has taken its order
    starter.kill()
    starter.wait()

    children[0].wait(timeout=PATIENCE_SECONDS)
