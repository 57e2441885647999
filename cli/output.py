"""What people see, and what programs read."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cli.table import columns


def show(document: Any, text: str, *, as_json: bool) -> None:
    """What came of a command, for programs or for people."""
    print(json.dumps(document, ensure_ascii=False, indent=2) if as_json else text)


def listed(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns below their names; nothing but the names is no table to look at."""
    return "\n".join(columns([names, *rows])) if rows else "none"


def local_time(unix_seconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_seconds)) if unix_seconds else "-"


def clock_time(unix_seconds: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_seconds))


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Tells on a terminal that something is under way, beside what is written to stdout, and leaves nothing of it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def counting(what: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar for bytes, on a terminal alone. What it gives is called with the number of bytes that have just been done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=size_bytes)
        yield lambda done: progress.advance(bar, done)
