"""The data directory: what lies where, who may look, and one owner at a time."""

import fcntl
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from worker.embedded.errors import AlreadyRunning, StackError

MIB = 1024 * 1024
LEAST_FREE_BYTES = 256 * MIB  # Postgres alone begins with some 60, and stops when it cannot write its log
PRIVATE_FOLDER, PRIVATE_FILE, PASSABLE_FOLDER = 0o700, 0o600, 0o711


@dataclass(frozen=True)
class Paths:
    """`root` is absolute. Everything below it is for its owner only, `postgres` for the user that Postgres runs as."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "stack.json"

    @property
    def credentials(self) -> Path:
        return self.root / "credentials.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    @property
    def s3(self) -> Path:
        return self.root / "s3"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def unfinished(self) -> Path:
        """There while a backup is restored, and afterwards if that broke off."""
        return self.root / "unfinished"

    def require_finished(self) -> None:
        """Raises StackError for what a restore that broke off has left."""
        if self.unfinished.exists():
            raise StackError(f"{self.root} holds half a backup: its restoring broke off; empty it and restore again")

    def make_root(self) -> None:
        """Raises StackError rather than take over what somebody else keeps under one of our names."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise StackError(f"{self.root} is or goes through a file; choose another --data-dir") from None
        except OSError as error:
            raise StackError(f"{self.root} cannot be made ({error.strerror}); choose another --data-dir") from None
        present = {path.name for path in self.root.iterdir()}
        foreign = sorted(present & {path.name for path in (self.state, *self._rooms)})
        if foreign and self.lock.name not in present:
            raise StackError(f"{self.root} holds {', '.join(foreign)}, and not from a stack; choose another --data-dir")
        if not present:
            self._close_root()

    def _close_root(self) -> None:
        # as root Postgres drops to another user, who passes through here without being able to look around
        mode = PASSABLE_FOLDER if os.geteuid() == 0 else PRIVATE_FOLDER
        try:
            self.root.chmod(mode)
        except OSError as error:
            raise StackError(f"{self.root} cannot be written to ({error.strerror}); choose another --data-dir") from None

    def make_rooms(self) -> None:
        """Make the folders, and make them private if they were there already."""
        for folder in self._rooms:
            folder.mkdir(exist_ok=True)
            folder.chmod(PRIVATE_FOLDER)

    @property
    def _rooms(self) -> tuple[Path, ...]:
        return self.logs, self.postgres, self.valkey, self.s3, self.work


def require_room(root: Path) -> None:
    """Raises StackError when the disk is so full that Postgres would stop soon after its start."""
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < LEAST_FREE_BYTES:
        message = f"the disk of {root} is full: {free_bytes // MIB} MiB are free and {LEAST_FREE_BYTES // MIB} are needed"
        raise StackError(f"{message}; free some, or choose another --data-dir")


def require_folder(folder: Path, *, variable: str) -> None:
    """Make a folder that may lie elsewhere, for our processes to write to. Raises StackError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"{folder} cannot be made ({error.strerror}); choose another with {variable}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StackError(f"{folder} cannot be written to; choose another with {variable}")


def hold(lock: Path) -> IO[str]:
    """Own the data directory for as long as the returned file is open. Raises AlreadyRunning, or StackError."""
    try:
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, PRIVATE_FILE), "r+")
    except OSError as error:
        raise StackError(f"{lock.parent} cannot be written to ({error.strerror}); choose another --data-dir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "unknown"
        file.close()
        raise AlreadyRunning(f"{lock.parent} is in use by a running stack (process {holder}); stop it first") from None
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def write_private(path: Path, text: str) -> None:
    """Replace `path`, readable by its owner only: a reader sees the old text or the new, even after a power cut."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def let_others_through(path: Path) -> list[Path]:
    """Make every folder above `path` passable to any user, not readable. Returns those that were not."""
    closed = [folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH]
    for folder in closed:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    return closed


def let_others_read(tree: Path) -> None:
    """Make a tree of programs and libraries, if there is one, usable by any user, whatever umask installed it."""
    for path in (tree, *tree.rglob("*")):
        if path.is_symlink() or not path.exists():
            continue
        mode = path.stat().st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if mode & needed != needed:
            path.chmod(mode | needed)
