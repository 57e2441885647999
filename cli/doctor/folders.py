"""Folders: whether they can be written, and have room."""

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
    """What is written to: by `tunesmith up` below the data directory unless told otherwise, by a service where settings say."""
    if data_dir is not None:
        # Postgres keeps up to 1 GiB of its log; files, checkpoints and adapters (20 MB each) come on top
        yield Room("data dir", data_dir, 1 * GIB, 5 * GIB, "--data-dir DIR")
    chosen = settings.model_fields_set if settings is not None else frozenset()
    below = data_dir or Path()
    cache, work = below / "cache", below / "work"
    if settings is not None and (is_service or "cache_dir" in chosen):
        cache = settings.cache_dir
    if settings is not None and is_service:
        work = settings.work_dir
    # the default base takes 300 MB in NF4 with its tokenizer, one of 8B 6 GB and its download 16 GB
    yield Room("cache dir", cache.absolute(), 500 * MIB, 2 * GIB, "TUNESMITH_CACHE_DIR=DIR")
    # each running job: its data and three checkpoints, of 60 MB with the optimizer's state for the default base
    work_name = "TUNESMITH_WORK_DIR=DIR" if is_service else "--data-dir DIR"
    yield Room("work dir", work.absolute(), 500 * MIB, 2 * GIB, work_name)
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
        make = "" if nearest == room.folder else f"sudo mkdir -p {room.folder} && "
        remedy = f"choose another with {room.choose}, or: {make}sudo chown $(id -u) {room.folder}"
        return failed(room.name, f"{where}: not writable ({error.strerror})", remedy)
    free_bytes = shutil.disk_usage(nearest).free
    found = f"{where}: writable, {free_bytes / GIB:.1f} GiB free"
    remedy = f"free {room.wanted_bytes / GIB:.1f} GiB there, or choose another with {room.choose}"
    if free_bytes < room.least_bytes:
        return failed(room.name, found, remedy)
    if free_bytes < room.wanted_bytes:
        return warning(room.name, found, remedy)
    return ok(room.name, found)


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
