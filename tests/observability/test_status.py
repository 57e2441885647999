"""`tunesmith status` beside a running stack: well, and what it says when something is not."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob
from pydantic import SecretStr

from app.core.settings import Settings
from app.models import Engine, Process
from app.standing import Standing, Waiting, Webhooks
from cli.status import report
from tests import make
from tests.deploy import compose
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.observability.conftest import Observed
from worker.embedded.servers import settings_of


def asked(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = (sys.executable, "-m", "cli.main", "status", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)


def told(observed: Observed) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(asked("--data-dir", observed.stack.data_dir, "--json").stdout)
    return found


@contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_running_stack_is_well(observed: Observed, trained: FineTuningJob) -> None:
    done = asked("--data-dir", observed.stack.data_dir)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout and "succeeded" in done.stdout


def test_as_json_it_names_every_part_and_who_lives(observed: Observed, trained: FineTuningJob) -> None:
    found = told(observed)

    assert found["is_well"] and found["problems"] == []
    parts = {part["name"]: part["state"] for part in found["parts"]}
    assert set(parts.values()) == {"ok"}
    assert {
        "api",
        "database system",
        "broker",
        "bucket",
        "schema",
        "relay",
        "cpu",
        "train",
        "engine",
        "queue cpu",
        "leases",
    } <= parts.keys()
    assert found["standing"]["jobs"]["succeeded"] >= 1
    assert {process["kind"] for process in found["standing"]["processes"]} == {"relay", "cpu", "train"}


def test_a_broker_that_falls_silent_is_named(observed: Observed, trained: FineTuningJob) -> None:
    settings = settings_of(observed.stack.data_dir, Settings())

    def states() -> dict[str, str]:
        return {part.name: part.state for part in report.look(settings).parts}

    with suspended(observed.stack.children("valkey-server")):
        assert states()["broker"] == "failed"
    eventually(lambda: set(states().values()) == {"ok"})


def process(kind: str, *queues: str, silent_seconds: float = 1) -> Process:
    now = datetime.now(UTC)
    about = {"heartbeat_at": now, "broker_at": now - timedelta(seconds=silent_seconds)}
    return Process(id=f"{kind}:1", kind=kind, queues=list(queues), **about)


WELL = Standing(
    jobs={"succeeded": 3},
    attempts=4,
    leases_expired=0,
    queues={"cpu": Waiting(2, 200), "train.cpu": Waiting(1, 3000)},
    outbox=Waiting(1, 2),
    webhooks=Webhooks(waiting=3, due=Waiting(1, 2), exhausted=9, disabled_endpoints=1),
    engines=[Engine(id="e", base=make.TINY, quantization="nf4")],
    processes=[process("relay"), process("cpu", "cpu"), process("train", "train.cpu")],
)


@pytest.mark.parametrize(
    ("changes", "name", "state"),
    [
        ({"processes": [*WELL.processes[1:]]}, "relay", "failed"),
        ({"processes": [*WELL.processes, process("cpu", silent_seconds=61)]}, "cpu", "failed"),
        ({"processes": [*WELL.processes[:2], process("train", "train.24")]}, "queue train.cpu", "failed"),
        ({"queues": {"cpu": Waiting(1, 301)}}, "queue cpu", "warning"),
        ({"queues": {"train.cpu": Waiting(1, 3601)}}, "queue train.cpu", "warning"),
        ({"leases_expired": 1}, "leases", "warning"),
        ({"outbox": Waiting(1, 61)}, "outbox", "failed"),
        ({"webhooks": Webhooks(waiting=1, due=Waiting(1, 61), exhausted=0, disabled_endpoints=0)}, "webhooks", "failed"),
        ({"engines": []}, "engine", "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_the_numbers_say_is_wrong(changes: dict[str, Any], name: str, state: str) -> None:
    assert {part.state for part in report.judged(WELL)} == {"ok"}
    assert {part.name: part.state for part in report.judged(replace(WELL, **changes)) if part.state != "ok"} == {name: state}


def test_it_says_how_to_start_a_cpu_worker_as_the_image_does() -> None:
    (command,) = (argument for name, argument in compose.instructions("Dockerfile.worker") if name == "CMD")

    assert report.KINDS["cpu"] == " ".join(json.loads(command))


@pytest.mark.parametrize("said", [b"[]", b"{}", b"nothing"])
def test_whoever_answers_in_the_apis_place_is_no_api(said: bytes, settings: Settings) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said)

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        gateway = settings.inference.model_copy(update={"gateway_url": f"http://127.0.0.1:{server.server_port}"})
        found = report.look(settings.model_copy(update={"inference": gateway}))
        server.shutdown()

    assert "api" in {part.name for part in found.problems}


def test_what_is_away_is_said_without_secrets(observed: Observed) -> None:
    settings = settings_of(observed.stack.data_dir, Settings())
    wrong = settings.database.system_url.get_secret_value().replace("/tunesmith", "/nowhere")
    away = settings.database.model_copy(update={"system_url": SecretStr(wrong)})
    found = report.look(settings.model_copy(update={"database": away}))

    assert {part.name for part in found.problems} == {"database system", "standing"}
    assert observed.state["system_password"] not in str(found)


def test_a_folder_without_a_stack_is_no_service(tmp_path: Path) -> None:
    done = asked("--data-dir", tmp_path)

    assert done.returncode == 1
    assert "holds no stack" in done.stderr and "Traceback" not in done.stderr
