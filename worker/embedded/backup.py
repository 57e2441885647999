"""All that a stack holds as a folder of files, and a stack made of one again.

In the folder: `manifest.json` (which release made it), `stack.json` (its secrets), `database.dump`, and every object under
`objects`. Nothing else is needed: what Valkey knows is rung again, and bases are fetched and quantized again.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psycopg
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from pydantic import BaseModel, ValidationError

from app import backups
from app.core.errors import NotFound
from app.core.settings import Settings
from app.core.storage import open_storage
from migrations import upgrade
from worker.embedded import postgres, roles
from worker.embedded.errors import AlreadyRunning, StackError
from worker.embedded.paths import PRIVATE_FOLDER, Paths, write_private
from worker.embedded.servers import Servers
from worker.embedded.state import State

FORMAT = 1
MANIFEST, STATE, DUMP, OBJECTS = "manifest.json", "stack.json", "database.dump", "objects"


class Manifest(BaseModel):
    """The content of manifest.json. `revision` is that of the schema, which a release knows or does not."""

    format: int
    release: str
    revision: str
    made_at: datetime
    objects: int


def back_up(data_dir: Path, to: Path, chosen: Settings) -> Manifest:
    """Copy a stack, running or not, to the folder `to`, which must not be there yet. Raises StackError.

    The rows first, as of one instant, then the objects: what the rows name is there, since none is deleted meanwhile.
    """
    _require_absent(to)
    with _reached(data_dir, chosen) as servers, _database(servers) as database:
        database.execute("SELECT pg_advisory_lock(%s)", (backups.LOCK,))
        _require_absent(to)  # of two at once the other was sooner
        draft = to.with_name(f".{to.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True, mode=PRIVATE_FOLDER)
        revision = _revision(database)
        # without the engines that answer now: they are not those of the stack that is made of it
        _run(servers, "pg_dump", "--format=custom", "--exclude-table-data=engines", f"--file={draft / DUMP}")
        count = _copy_objects(servers, draft / OBJECTS)
        write_private(draft / STATE, servers.state.model_dump_json(indent=2) + "\n")
        manifest = Manifest(
            format=FORMAT, release=version("tunesmith"), revision=revision, made_at=datetime.now(UTC), objects=count
        )
        write_private(draft / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        database.execute("SELECT")  # raises if Postgres went away meanwhile, and with it the lock: what rows name may be deleted
        draft.rename(to)  # a half-made backup never bears the name
    return manifest


def restore(source: Path, data_dir: Path, chosen: Settings) -> Manifest:
    """Make the stack of a backup in `data_dir`, which must be empty or not there; then `up` runs it. Raises StackError."""
    manifest, state = _read(source)
    _require_known(manifest)
    _require_whole(source, manifest)
    if data_dir.exists() and any(data_dir.iterdir()):
        raise StackError(f"{data_dir} is not empty; a backup is restored into a data directory of its own: choose --data-dir")
    servers = Servers(data_dir, chosen)
    try:
        servers.claim()
        servers.paths.unfinished.touch()
        state.save(servers.paths.state)
        servers.start()
        _run(servers, "pg_restore", "--exit-on-error", str(source / DUMP))
        _bring_objects(servers, source / OBJECTS)
        servers.paths.unfinished.unlink()
    finally:
        servers.stop()
    return manifest


def _require_absent(to: Path) -> None:
    if to.exists():
        raise StackError(f"{to} is there already; name a folder that is not, so that no backup is overwritten")


@contextmanager
def _reached(data_dir: Path, chosen: Settings) -> Iterator[Servers]:
    """The servers of a running stack, or else started for as long as the block lasts."""
    paths = Paths(data_dir.resolve())
    if not paths.state.exists():
        raise StackError(f"{paths.root} holds no stack; say where it is with --data-dir")
    paths.require_finished()
    servers = Servers(data_dir, chosen)
    try:
        servers.start()
    except AlreadyRunning:
        servers = Servers(data_dir, chosen)
        servers.join()
    try:
        yield servers
    finally:
        servers.stop()


@contextmanager
def _database(servers: Servers) -> Iterator[psycopg.Connection]:
    try:
        with psycopg.connect(servers.superuser_dsn, dbname=roles.DATABASE, autocommit=True, connect_timeout=5) as connection:
            yield connection
    except psycopg.OperationalError as error:
        raise StackError(f"the database does not answer: {error}") from error


def _revision(database: psycopg.Connection) -> str:
    try:
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        row = None
    if row is None:
        raise StackError("the database was never brought up to date; run `tunesmith up` once")
    return str(row[0])


def _copy_objects(servers: Servers, folder: Path) -> int:
    storage, count = open_storage(servers.settings.storage), 0
    folder.mkdir(mode=PRIVATE_FOLDER)
    for key in storage.list_keys(""):
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        with suppress(NotFound):  # of an upload that was refused just now: no row names it
            storage.get_file(key, path)
            count += 1
    return count


def _bring_objects(servers: Servers, folder: Path) -> None:
    storage = open_storage(servers.settings.storage)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put_file(path.relative_to(folder).as_posix(), path)


def _read(source: Path) -> tuple[Manifest, State]:
    try:
        manifest = Manifest.model_validate_json((source / MANIFEST).read_bytes())
        return manifest, State.model_validate_json((source / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise StackError(f"{source} is no backup that can be read: {MANIFEST} or {STATE} is missing or damaged") from error


def _require_known(manifest: Manifest) -> None:
    """Raises StackError for a backup of a release that came after this one."""
    known = ScriptDirectory(str(Path(upgrade.__file__).parent))
    try:
        known.get_revision(manifest.revision)
        is_known = manifest.format <= FORMAT
    except CommandError:
        is_known = False
    if not is_known:
        raise StackError(
            f"the backup was made by tunesmith {manifest.release}, which is newer than this one ({version('tunesmith')}): "
            "install that release, or a later one, and restore it with that"
        )


def _require_whole(source: Path, manifest: Manifest) -> None:
    """Raises StackError for a backup that has lost objects since it was made."""
    there = sum(path.is_file() for path in (source / OBJECTS).rglob("*"))
    if there < manifest.objects:
        raise StackError(f"{source} is damaged: it holds {there} of its {manifest.objects} objects; restore from another copy")


def _run(servers: Servers, program: str, *arguments: str) -> None:
    """Postgres's own tool, told where and as whom by its environment: anyone may read a command line."""
    ports, password = servers.state.ports, servers.state.superuser_password
    assert ports is not None  # the servers answer there
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(ports.postgres), "PGUSER": "postgres", "PGPASSWORD": password}
    command = [str(postgres.tool(program)), f"--dbname={roles.DATABASE}", *arguments]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **where}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"{program} failed: {' '.join(done.stderr.split())[-500:]}")
