"""Starts that meet trouble: servers that come later, a data directory that will not do, a disk that is full or fills."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from app.core.settings import Settings
from cli.main import main
from migrations.upgrade import upgrade
from tests import make
from tests.conftest import serving_api
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker.embedded import Servers, environment, servers, stack
from worker.embedded.paths import LEAST_FREE_BYTES, MIB
from worker.embedded.programs import CODE, as_program, service
from worker.embedded.state import usable_ports

CALM_SECONDS, MOST_LINES = 3.0, 20  # what a process that waits says meanwhile


@contextmanager
def started(name: str, command: tuple[str, ...], settings: dict[str, str], logs: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with (logs / name).open("w") as log:
        process = subprocess.Popen(command, env=settings, cwd=CODE, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def readyz(url: str) -> httpx.Response | None:
    try:
        return httpx.get(f"{url}/readyz", timeout=20)
    except httpx.TransportError:
        return None


def test_every_process_waits_for_its_servers_and_then_works(tmp_path: Path, bases_dir: Path) -> None:
    """No process is started twice: what is away at its start comes later, and it goes on."""
    data_dir = tmp_path / "data"
    with servers(data_dir, durable=False) as before:
        upgrade(before.settings.database.owner_url.get_secret_value())
        stack.ensure_key(before)
    port = usable_ports(None, avoid=before.state.ports.model_dump().values()).s3
    url = f"http://127.0.0.1:{port}"
    settings = _settings(before.settings, bases_dir, url)
    owner = environment.of(settings, secrets=environment.PRIVATE)
    with ExitStack() as running:
        migrating = (sys.executable, "-m", "cli.main", "migrate", "--wait", "900")
        migration = running.enter_context(started("migrate", migrating, owner, tmp_path))
        processes = {}
        for process in service(settings, "127.0.0.1", port):
            program = as_program(process, settings, before.state.ports)
            processes[process.name] = running.enter_context(
                started(process.name, program.command, {**program.environment, **make.UNHURRIED}, tmp_path)
            )
        eventually(lambda: readyz(url))
        answer = readyz(url)
        assert answer is not None
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "database_unavailable")
        assert "database" in error["message"] and "storage" in error["message"] and answer.headers["retry-after"]
        waits = {
            "api": '"missing": "database"',
            "relay": "relay_waits_for_database",
            "cpu": "Cannot connect to redis",
            "train": "Cannot connect to redis",
            "engine": "object storage does not answer",
            "migrate": "waiting up to 900 s",
        }
        eventually(lambda: all(words in (tmp_path / name).read_text() for name, words in waits.items()))
        lines = {name: (tmp_path / name).read_text().count("\n") for name in waits}
        time.sleep(CALM_SECONDS)
        logs = {name: (tmp_path / name).read_text() for name in waits}
        assert {name: log for name, log in logs.items() if "Traceback" in log} == {}
        assert all(log.count("\n") - lines[name] < MOST_LINES for name, log in logs.items()), logs
        assert migration.poll() is None and all(process.poll() is None for process in processes.values())

        running.enter_context(servers(data_dir, durable=False))
        eventually(lambda: (said := readyz(url)) and said.status_code == 200)
        assert migration.wait(timeout=PATIENCE_SECONDS) == 0
        client = running.enter_context(OpenAI(base_url=f"{url}/v1", api_key=before.state.api_key))
        training = client.files.create(file=("a.jsonl", make.chat_file(8)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=make.TINY, training_file=training.id, hyperparameters={"n_epochs": 1})
        eventually(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
        assert all(process.poll() is None for process in processes.values())


def _settings(settings: Settings, bases_dir: Path, url: str) -> Settings:
    """On the tiny base, as `up` would pass them on."""
    inference = settings.inference.model_copy(update={"base": make.TINY, "gateway_url": url})
    training = settings.training.model_copy(update={"warm_base": make.TINY})
    return settings.model_copy(update={"inference": inference, "training": training, "cache_dir": bases_dir})


def refused(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `up` says in one line before it exits with 1."""
    port = usable_ports(None).s3
    assert main(["up", "--data-dir", str(data_dir), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tunesmith: ") and said.count("\n") == 1
    return said


def test_a_data_directory_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{data_dir} is or goes through a file" in refused(data_dir, capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1\n")  # a process that lives and is not ours
    found = Servers(tmp_path)
    found.claim()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    found.stop()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory. Skips where it cannot be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_data_directory_that_cannot_be_written_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "ro,size=1m") as disk:
        assert f"{disk} cannot be written to (Read-only file system)" in refused(disk, capsys)


def test_a_disk_without_room_is_refused_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "size=64m") as disk:
        said = refused(disk, capsys)
        assert re.search(rf"{disk} is full: 6\d MiB are free and {LEAST_FREE_BYTES // MIB} are needed", said)
        assert [path.name for path in disk.iterdir()] == ["lock"]


def test_a_data_directory_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "ro,size=1m") as disk:
        assert "Read-only file system" in refused(disk / "below", capsys)


def fill(path: Path, *, leave_bytes: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(path.parent).free - leave_bytes)


def test_a_disk_that_fills_up_refuses_uploads_and_harms_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=500m") as disk, servers(disk / "data", durable=False) as running:
        upgrade(running.settings.database.owner_url.get_secret_value())
        stack.ensure_key(running)
        with serving_api(running.settings) as url:
            headers = {"Authorization": f"Bearer {running.state.api_key}"}
            with httpx.Client(base_url=f"{url}/v1", headers=headers, timeout=PATIENCE_SECONDS) as http:

                def upload(content: bytes) -> httpx.Response:
                    return http.post("/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})

                before = upload(make.chat_file(1000)).json()["id"]
                fill(disk / "filler", leave_bytes=8 * MIB)
                refusal = upload(make.chat_line("a" * 1000, "b").encode() * 20_000)
                assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "storage_unavailable"), refusal.text
                assert "its disk may be full" in refusal.text
                assert refusal.headers["retry-after"]
                assert [file["id"] for file in http.get("/files").json()["data"]] == [before]
                (disk / "filler").unlink()
                after = upload(make.chat_file(1000)).json()["id"]
                for file_id in (before, after):
                    assert http.get(f"/files/{file_id}/content").content == make.chat_file(1000)
