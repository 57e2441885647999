"""What is no backup, or no place for one, is refused in words before anything is touched."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic.script import ScriptDirectory

from app import backups
from app.core.errors import NotFound
from app.core.settings import Settings
from app.core.storage import Storage
from cli.main import main
from tests import make
from tests.embedded.patience import eventually
from worker.embedded import Servers, StackError, roles
from worker.embedded.backup import Manifest, back_up

ROOT = Path(__file__).resolve().parents[2]
HEAD = ScriptDirectory(str(ROOT / "migrations")).get_current_head()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def made(folder: Path, **changes: object) -> Path:
    """As much of a backup as is read before anything is done."""
    manifest = {"format": 1, "release": "9.0.0", "revision": HEAD, "made_at": "2031-01-01T00:00:00Z", "objects": 0}
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    (folder / "stack.json").write_text("{}")
    return folder


@pytest.mark.parametrize("newer", [{"revision": "9999x"}, {"format": 2}])
def test_a_backup_of_a_newer_release_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], newer: dict[str, object]
) -> None:
    said = refused(capsys, "restore", made(tmp_path / "backup", **newer), "--data-dir", tmp_path / "data")

    assert "made by tunesmith 9.0.0, which is newer than this one" in said
    assert not (tmp_path / "data").exists()


def test_a_folder_that_holds_something_is_not_restored_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backup = made(tmp_path / "backup")

    assert "is not empty" in refused(capsys, "restore", backup, "--data-dir", backup)
    assert {path.name for path in backup.iterdir()} == {"manifest.json", "stack.json"}


def test_what_is_no_backup_is_not_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no backup that can be read" in refused(capsys, "restore", tmp_path, "--data-dir", tmp_path / "data")


def test_a_backup_that_lost_objects_is_not_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backup = made(tmp_path / "backup", objects=2)
    (backup / "objects" / "orgs").mkdir(parents=True)
    (backup / "objects" / "orgs" / "a").touch()

    assert "holds 1 of its 2 objects" in refused(capsys, "restore", backup, "--data-dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@contextmanager
def dumping(servers: Servers, to: Path) -> Iterator[tuple[ThreadPoolExecutor, "Future[Manifest]", psycopg.Connection]]:
    """A backup that has the lock, and whose dump waits for the end of the block."""
    dsn = f"{servers.superuser_dsn.rpartition('/')[0]}/{roles.DATABASE}"
    with (
        ThreadPoolExecutor(2) as threads,
        psycopg.connect(dsn, autocommit=True) as superuser,
        psycopg.connect(dsn) as blocking,
    ):
        blocking.execute("LOCK TABLE sweeps IN ACCESS EXCLUSIVE MODE")
        first = threads.submit(back_up, servers.paths.root, to, Settings())
        waits = "SELECT FROM pg_stat_activity WHERE application_name = 'pg_dump' AND wait_event_type = 'Lock'"
        eventually(lambda: superuser.execute(waits).rowcount)
        yield threads, first, superuser


def test_a_backup_that_lost_its_lock_is_none(servers: Servers, tmp_path: Path) -> None:
    """Postgres went away while it was made: objects may have been deleted which the dump names."""
    with dumping(servers, tmp_path / "backup") as (_, first, superuser):
        holds = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s"
        assert superuser.execute(holds, (backups.LOCK,)).rowcount == 1

    with pytest.raises(StackError, match="does not answer"):
        first.result()
    assert not (tmp_path / "backup").exists()


def test_of_two_backups_to_one_folder_the_first_is_whole(servers: Servers, storage: Storage, tmp_path: Path) -> None:
    storage.put("orgs/org_backup/a", b"a")
    with dumping(servers, tmp_path / "backup") as (threads, first, superuser):
        second = threads.submit(back_up, servers.paths.root, tmp_path / "backup", Settings())
        waits = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
        eventually(lambda: superuser.execute(waits, (backups.LOCK,)).rowcount)

    copied = [path for path in (tmp_path / "backup" / "objects").rglob("*") if path.is_file()]
    assert len(copied) == first.result().objects > 0
    with pytest.raises(StackError, match="is there already"):
        second.result()


def test_what_storage_does_not_hold_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    """Else a backup would bring it back empty."""
    with pytest.raises(NotFound):
        storage.get_file("orgs/org_backup/gone", tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_no_backup_is_overwritten_and_none_is_made_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is there already" in refused(capsys, "backup", tmp_path, "--data-dir", tmp_path)
    assert "holds no stack" in refused(capsys, "backup", tmp_path / "backup", "--data-dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_a_restored_stack_does_not_start_and_is_not_backed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lock", "unfinished", "stack.json"):
        (tmp_path / name).touch()

    assert "holds half a backup" in refused(capsys, "up", "--data-dir", tmp_path, "--port", make.free_port())
    assert "holds half a backup" in refused(capsys, "backup", tmp_path / "backup", "--data-dir", tmp_path)
