"""Health check of a process that listens nowhere: `alive.py PORT WORD…`.

It is well if a process of this container that has these words in its command line runs, neither stopped nor a corpse, and holds
an open connection to that port: the relay listens to Postgres, a worker to Valkey. Whoever has lost it and waits is not well.
Reads /proc and nothing else, so that it costs milliseconds and needs no secret.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
STOPPED = frozenset("TtZX")
ESTABLISHED = "01"


def main(arguments: list[str]) -> int:
    port, words = int(arguments[0]), arguments[1:]
    candidates = [process for process in _processes() if _is_meant(process, words)]
    if not candidates:
        print(f"no process runs {' '.join(words)}")
        return 1
    if not any(_connections(process) & _sockets_to(process, port) for process in candidates):
        print(f"no connection to port {port}")
        return 1
    return 0


def _processes() -> Iterator[Path]:
    return (entry for entry in PROC.iterdir() if entry.name.isdecimal() and int(entry.name) != os.getpid())


def _is_meant(process: Path, words: list[str]) -> bool:
    """One with our own configuration, in case several installations share a machine without containers."""
    try:
        command = (process / "cmdline").read_text().split("\0")
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        is_ours = _configuration((process / "environ").read_text().split("\0")) == _configuration(
            f"{name}={value}" for name, value in os.environ.items()
        )
    except (OSError, UnicodeDecodeError):  # gone meanwhile, or somebody else's
        return False
    is_python = "python" in Path(command[0]).name  # not the init process that names us as its child
    return is_python and is_ours and state not in STOPPED and all(word in command for word in words)


def _configuration(variables: "Iterator[str] | list[str]") -> frozenset[str]:
    return frozenset(variable for variable in variables if variable.startswith("TUNESMITH_"))


def _connections(process: Path) -> set[str]:
    """The inodes of its open sockets."""
    found = set()
    for descriptor in (process / "fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def _sockets_to(process: Path, port: int) -> set[str]:
    """The inodes of all established connections to this port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            _, _, remote, state, *rest = line.split()
            if state == ESTABLISHED and int(remote.rpartition(":")[2], 16) == port:
                found.add(rest[5])
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
