"""The service under test: `tunesmith up` in a folder that outlives it, its servers behind proxies, and a way to look inside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg
from openai import DefaultHttpxClient, OpenAI
from openai.types.fine_tuning import FineTuningJob
from psycopg.rows import dict_row
from pydantic import SecretStr

from app.core.settings import StorageSettings
from app.core.storage import Storage, open_storage
from bench.chaos.proxy import Proxy, serving
from bench.chaos.up import SERVERS_FILE
from tests.make import free_port
from worker.embedded.state import State

ROOT = Path(__file__).resolve().parents[2]
BASE = "tiny-random-llama"
UP_SECONDS, STOP_SECONDS, EVENTUALLY_SECONDS = 180.0, 90.0, 60.0
LEASE_SECONDS = 3.0
SETTINGS = {
    "INFERENCE__BASE": BASE,
    "TRAINING__WARM_BASE": BASE,
    "LEASES__LEASE_SECONDS": f"{LEASE_SECONDS:g}",
    "LEASES__HEARTBEAT_SECONDS": "0.5",
    # a job here is struck a thousand times as often as in life: what is asked is whether it is lost, not whether it is given up
    "LEASES__MAX_ATTEMPTS": "1000",
    "LEASES__MAX_DEATHS_AT_STEP": "1000",
    "LEASES__BACKOFF_SECONDS": "0.2",
    "WEBHOOKS__TIMEOUT_SECONDS": "2",
    "LOG_LEVEL": "INFO",
}
SERVERS = ("postgres", "valkey", "s3")
PROCESSES = {  # words of their command lines
    "postgres": ("pginstall", "-D"),
    "valkey": ("valkey",),
    "s3": ("nanio", "serve"),
    "api": ("app.main:create_app",),
    "relay": ("worker.relay",),
    "cpu": ("worker.celery", "cpu@"),
    "train": ("-m worker.train",),
    "engine": ("worker.inference.server",),
}
COMMANDS = {**PROCESSES, "train": ("bench.chaos.train",), "trainer": ("bench.chaos.toy_trainer",)}
T = TypeVar("T")


class Stuck(AssertionError):
    """What must come in the end did not."""


@dataclass(frozen=True)
class House:
    process: "subprocess.Popen[bytes]"
    data_dir: Path
    base_url: str
    api_key: str
    proxies: dict[str, Proxy]

    def client(self, *, max_retries: int = 5) -> OpenAI:
        """The unmodified SDK, as customers have it."""
        http = DefaultHttpxClient(verify=False, trust_env=False)
        return OpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=max_retries, timeout=60, http_client=http)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those that run under this name, the oldest first: there are two train workers, and each has trainers."""
        words = COMMANDS[name]
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        mine = [child for child in found if all(word in _command(child) for word in words)]
        if name == "postgres":  # it has a child for each connection, which bears its name no more
            return mine[:1]
        return sorted(mine, key=lambda child: child.pid)

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Asked of Postgres itself, past the proxies, as its superuser."""
        with psycopg.connect(self._superuser_url, autocommit=True, connect_timeout=5, row_factory=dict_row) as connection:
            return connection.execute(query, values).fetchall()  # type: ignore[arg-type]

    def change(self, statement: str) -> None:
        with psycopg.connect(self._superuser_url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    def storage(self) -> Storage:
        return open_s3(self._state)

    @property
    def valkey_url(self) -> str:
        return f"redis://:{self._state.valkey_password}@127.0.0.1:{_listening(self.data_dir)['valkey']}/0"

    @property
    def _superuser_url(self) -> str:
        port = _listening(self.data_dir)["postgres"]
        return f"postgresql://postgres:{self._state.superuser_password}@127.0.0.1:{port}/tunesmith"

    @property
    def _state(self) -> State:
        return State.load(self.data_dir / "stack.json")


@contextmanager
def house(data_dir: Path, cache_dir: Path, *, crash_at: Path | None = None) -> Iterator[House]:
    """Up until the block ends. What was left in `data_dir` is gone on with."""
    data_dir.mkdir(parents=True, exist_ok=True)
    proxies = {name: Proxy(lambda name=name: _listening(data_dir)[name]) for name in SERVERS}  # type: ignore[misc]
    (data_dir / "credentials.json").unlink(missing_ok=True)
    ports = json.dumps({name: proxy.port for name, proxy in proxies.items()})
    command = [sys.executable, "-m", "bench.chaos.up", str(data_dir), str(free_port()), ports]
    environment = os.environ | {f"TUNESMITH_{name}": value for name, value in SETTINGS.items()}
    environment |= {"TUNESMITH_CACHE_DIR": str(cache_dir), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    if crash_at:
        environment["CRASH_AT"] = str(crash_at)
    with serving(*proxies.values()), (data_dir / "console").open("a") as console:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
        try:
            credentials = data_dir / "credentials.json"
            eventually(lambda: process.poll() is not None or credentials.exists(), "the stack is up", seconds=UP_SECONDS)
            if not credentials.exists():
                raise Stuck((data_dir / "console").read_text()[-3000:])
            yield House(process, data_dir, **json.loads(credentials.read_text()), proxies=proxies)
        finally:
            for proxy in proxies.values():
                proxy.clear()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=STOP_SECONDS)


def eventually(found: Callable[[], T], what: str, *, seconds: float | None = None, pause_seconds: float = 0.1) -> T:
    """What `found` finds in the end. Raises Stuck."""
    seconds = EVENTUALLY_SECONDS if seconds is None else seconds
    give_up_at = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > give_up_at:
            raise Stuck(f"not within {seconds:g} s: {what}")
        time.sleep(pause_seconds)
    return value


def with_children(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Postgres has one for each connection, a worker has trainers."""
    found = dict.fromkeys(processes)
    for process in processes:
        try:
            found |= dict.fromkeys(process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
    return list(found)


def _listening(data_dir: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((data_dir / SERVERS_FILE).read_text())
    return found


def open_s3(state: State) -> Storage:
    """The bucket of a stack that has been started."""
    assert state.ports is not None
    url, secret_key = f"http://127.0.0.1:{state.ports.s3}", SecretStr(state.s3_secret_key)
    return open_storage(StorageSettings(endpoint_url=url, access_key=state.s3_access_key, secret_key=secret_key))


def adapter_sha256(storage: Storage, job: FineTuningJob) -> str:
    """Of the weights that a job has come to, as they lie in the bucket."""
    directory = f"/{job.id}/a{(job.model_extra or {})['attempt']}/adapter"
    (key,) = [key for key in storage.list_keys("orgs/") if key.endswith(f"{directory}/adapter_model.safetensors")]
    return storage.sha256_of(key)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just died
        return ""
