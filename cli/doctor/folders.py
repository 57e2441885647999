"""Folders: whether they can be written, and have room."""

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.doctor.finding import Finding, failed, ok, skipped, warning

if TYPE_CHECKING:
    from app.core.settings import Settings

MIB, GIB = 1024**2, 1024**3
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - it is looked at, and never trusted
# Postgres puts the memory of parallel queries there, and NCCL what GPUs pass to each other; docker gives 64 MiB
WANTED_SHARED_MEMORY_BYTES = 64 * MIB


@dataclass(frozen=True)
class Room:
    """A folder with the bytes below which something breaks, and those below which it soon will."""

    name: str
    folder: Path
    least_bytes: int
    wanted_bytes: int
    choose: str


def rooms(data_dir: Path | None, settings: "Settings | None", *, is_service: bool) -> Iterator[Room]:
    """What is written to. The scratch space of `tunesmith up` is a part of its data directory unless a setting says otherwise."""
    if data_dir is not None:
        # Postgres keeps up to 1 GiB of its log; files, checkpoints and adapters (20 MB each) come on top
        yield Room("data dir", data_dir, 1 * GIB, 5 * GIB, "--data-dir DIR")
    if settings is not None:
        # the default base takes 300 MB in NF4 with its tokenizer, one of 8B 6 GB and its download 16 GB
        yield Room("cache dir", settings.cache_dir.absolute(), 500 * MIB, 2 * GIB, "TUNESMITH_CACHE_DIR=DIR")
        if is_service or "work_dir" in settings.model_fields_set:
            # each running job: its data and three checkpoints, of 60 MB with the optimizer's state for the default base
            yield Room("work dir", settings.work_dir.absolute(), 500 * MIB, 2 * GIB, "TUNESMITH_WORK_DIR=DIR")
    # the default base passes through it in 16 bit, 270 MB, when it is quantized
    yield Room("temp dir", Path(tempfile.gettempdir()), 500 * MIB, 1 * GIB, "TMPDIR=DIR")


def examine(room: Room) -> Finding:
    """Write and delete a file in the folder or, as nothing is to be changed, in the nearest above it that exists."""
    nearest = next(path for path in (room.folder, *room.folder.parents) if _is_there(path))
    where = f"{room.folder}" if nearest == room.folder else f"{room.folder} (to be made in {nearest})"
    if not nearest.is_dir():
        return failed(room.name, f"{where}: {nearest} is not a folder", f"choose another with {room.choose}")
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".tunesmith-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        total_bytes = shutil.disk_usage(nearest).total
        remedy = access_remedy(room, nearest, reason=error.errno, user=os.geteuid(), total_bytes=total_bytes)
        return failed(room.name, f"{where}: not writable ({error.strerror})", remedy)
    disk = shutil.disk_usage(nearest)
    found = f"{where}: writable, {disk.free / GIB:.1f} GiB free"
    if disk.free >= room.wanted_bytes:
        return ok(room.name, found)
    wanted = f"{room.wanted_bytes / GIB:.1f} GiB"
    remedy = f"choose another with {room.choose}"
    if disk.total < room.wanted_bytes:
        remedy += f": {wanted} are wanted, and the whole disk has {disk.total / GIB:.1f} GiB"
    else:
        remedy = f"free {wanted} there, or {remedy}"
    return (failed if disk.free < room.least_bytes else warning)(room.name, found, remedy)


def access_remedy(room: Room, nearest: Path, *, reason: int | None, user: int, total_bytes: int) -> str:
    """Giving the folder away helps where rights are wanting: not on a disk mounted read-only, not where the kernel shows itself
    as files (/sys: a disk of no bytes), and not root, who has every right."""
    choose = f"choose another with {room.choose}"
    if reason not in {errno.EACCES, errno.EPERM} or user == 0 or total_bytes == 0:
        return choose
    folder = shlex.quote(str(room.folder))
    make = "" if nearest == room.folder else f"sudo mkdir -p {folder} && "
    return f"{choose}, or: {make}sudo chown $(id -u) {folder}"


def _is_there(path: Path) -> bool:
    """Also false below a folder that we may not enter: the check then tells of that folder."""
    try:
        return path.exists()
    except PermissionError:
        return False


def shared_memory() -> Finding:
    if not SHARED_MEMORY.exists():
        return skipped("shared memory", f"there is no {SHARED_MEMORY}", "nothing to do, but in a container: mount a tmpfs there")
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    room = Room("shared memory", SHARED_MEMORY, 0, 0, "")
    if (written := examine(room)).state == "failed":
        return failed("shared memory", written.found, f"sudo chmod 1777 {SHARED_MEMORY}")
    found = f"{SHARED_MEMORY}: writable, {free_bytes / MIB:.0f} MiB free"
    if free_bytes < WANTED_SHARED_MEMORY_BYTES:
        return warning("shared memory", found, "docker run --shm-size 1g …, or delete what lies there")
    return ok("shared memory", found)
