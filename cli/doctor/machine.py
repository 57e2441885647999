"""What the machine is: interpreter, system, memory, cores, user."""

import os
import platform
import shutil
import sys
from pathlib import Path

from cli.doctor import cgroup
from cli.doctor.finding import Finding, failed, ok, warning

GIB = 1024**3
OLDEST_PYTHON = (3, 11)
# engine and trainer each hold torch and a base, about 1 GiB with the smallest; API, Celery and the servers share the rest
WANTED_MEMORY_BYTES = 4 * GIB
LEAST_MEMORY_BYTES = 2 * GIB  # below it the kernel ends the trainer in the middle of a job
WANTED_CORES = 2  # training and answering at once
POSTGRES_USER = "embedded_postgres"


def python() -> Finding:
    bits = 64 if sys.maxsize > 2**32 else 32
    found = f"{platform.python_version()}, {bits} bit, {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON or bits != 64:
        return failed("python", found, "install Python 3.11 or newer, 64 bit, then: python3.11 -m venv .venv")
    return ok("python", found)


def system() -> Finding:
    library, version = platform.libc_ver()
    found = " ".join(filter(None, (platform.system(), platform.release(), platform.machine(), library, version)))
    if platform.system() == "Darwin":
        return warning("platform", found, "for training on a GPU, and for a service, use Linux")
    if platform.system() != "Linux" or platform.machine().lower() not in {"x86_64", "amd64", "aarch64", "arm64"}:
        return failed("platform", found, "use Linux on x86_64 or aarch64; on Windows: wsl --install")
    if library != "glibc":
        return failed("platform", f"{found}, without glibc", "torch has no wheels for it; use an image such as python:3.11-slim")
    return ok("platform", found)


def memory() -> Finding:
    total, available = _memory_bytes()
    found = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    if (limit := cgroup.memory()) is not None and limit.bytes < total:
        total, available = limit.bytes, min(available, limit.bytes - limit.used_bytes)
        found += f"; control group: {limit.bytes / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    if available < LEAST_MEMORY_BYTES:
        return failed("memory", found, f"free memory or raise the limit: {_gib(LEAST_MEMORY_BYTES)} are the least, {_wanted()}")
    if available < WANTED_MEMORY_BYTES:
        return warning("memory", found, f"end other programs, or raise the limit: {_wanted()}")
    return ok("memory", found)


def cores() -> Finding:
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found = f"{usable:g} of {os.cpu_count()} cores usable"
    if (quota := cgroup.cores()) is not None and quota < usable:
        usable = quota
        found += f"; control group: {quota:g}"
    if usable < WANTED_CORES:
        return warning(
            "cpu", found, f"give it {WANTED_CORES} cores or more (docker run --cpus 2): training and serving go on at once"
        )
    return ok("cpu", found)


def user() -> Finding:
    """Postgres refuses to run as root; `tunesmith up` then lends it a user of its own."""
    import pwd  # not on Windows, where the rest still has to say so

    if os.geteuid() != 0:
        return ok("user", f"{_user_name()}; Postgres runs as the same")
    try:
        pwd.getpwnam(POSTGRES_USER)
    except KeyError:
        if shutil.which("useradd") is None:
            remedy = f"adduser --system --shell /bin/false {POSTGRES_USER}, or run as an ordinary user"
            return failed("user", "root, and there is no useradd to make a user for Postgres", remedy)
        return ok("user", f"root; `tunesmith up` makes the user {POSTGRES_USER} for Postgres")
    return ok("user", f"root; Postgres runs as {POSTGRES_USER}")


def _memory_bytes() -> tuple[int, int]:
    """Total and available."""
    try:
        import psutil  # type: ignore[import-untyped]  # it has no types of its own
    except ImportError:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), _available_bytes() or page * os.sysconf("SC_AVPHYS_PAGES")
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _available_bytes() -> int | None:
    """Linux counts what it can take back from its caches; sysconf does not."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # an id that a container was started with
        return f"user {os.geteuid()}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:g} GiB"


def _wanted() -> str:
    return f"{_gib(WANTED_MEMORY_BYTES)} serve and train the smallest base"
