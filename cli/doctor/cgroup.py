"""The limits of this process's control groups, version 1 or 2: what a container may use of its machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OWN, ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# limit, use, and the name of those bytes in memory.stat that the kernel takes back when it needs them
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryLimit:
    """`used_bytes` without the file caches that are given up first."""

    bytes: int
    used_bytes: int


def memory(own: Path = OWN, root: Path = ROOT) -> MemoryLimit | None:
    """The one that leaves least, of this group and those above it. Version 1 writes no limit as a number beyond all machines."""
    limits = [
        MemoryLimit(limit, _number(group / used) - _stat(group / "memory.stat", reclaimable))
        for group in _groups("memory", own, root)
        for name, used, reclaimable in MEMORY_FILES
        if (limit := _number(group / name)) > 0
    ]
    return min(limits, key=lambda limit: limit.bytes - limit.used_bytes, default=None)


def cores(own: Path = OWN, root: Path = ROOT) -> float | None:
    """The smallest quota, in cores."""
    quotas = []
    for group in _groups("cpu", own, root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _groups(controller: str, own: Path, root: Path) -> Iterator[Path]:
    """From this process's group up to the mount. In a container the mount often is the group, whatever its path says."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount) and folder.is_dir())


def _stat(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _text(path).splitlines() if line.split()[0] == name), 0)


def _number(path: Path) -> int:
    """0 if it is not there or says `max`."""
    text = _text(path)
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
