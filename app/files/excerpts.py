"""Lines of a file by number, for whoever has to mend them."""

from collections.abc import Collection, Iterator
from contextlib import suppress

from app.core import data
from app.core.errors import NotFound, Unavailable
from app.core.storage import Storage
from app.models import File

MOST_BYTES = 16 * 1024 * 1024  # of a longer file lines further on are not shown
SHOWN, WHOLE = 400, 64 * 1024  # characters of a line: its beginning, and as much as is read of one that is taken apart


def lines_of(storage: Storage, file: File, wanted: Collection[int], *, shown: int = SHOWN) -> dict[int, str]:
    """The beginnings of those lines that are found, counted from 1: so many characters. None are while storage is away: what is
    told of them is worth reading without."""
    found = dict[int, str]()
    last = max(wanted, default=0)
    if not last:
        return found
    with suppress(NotFound, Unavailable):
        for number, line in enumerate(data.split_lines(_beginning(storage, file)), 1):
            if number in wanted:
                text = line[: shown * 4].decode("utf-8", "replace")
                found[number] = text[:shown] + "…" if len(text) > shown else text
            if number >= last:
                break
    return found


def _beginning(storage: Storage, file: File) -> Iterator[bytes]:
    read_bytes = 0
    for chunk in storage.stream(file.storage_key):
        yield chunk
        read_bytes += len(chunk)
        if read_bytes >= MOST_BYTES:
            return
