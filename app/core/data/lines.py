"""A stream cut into lines."""

from collections.abc import Iterable, Iterator

MAX_LINE_BYTES = 1024 * 1024


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines of a stream, split on \n only: JSON strings may hold the other line separators of Unicode.

    A line over the limit is cut there, so that a file without line ends cannot fill the memory; the parser refuses it.
    """
    rest = b""
    is_skipping = False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if not is_skipping:
                yield line
            is_skipping = False
        if len(rest) > MAX_LINE_BYTES:
            if not is_skipping:
                yield rest[: MAX_LINE_BYTES + 1]
            is_skipping, rest = True, b""
    if rest and not is_skipping:
        yield rest
