"""Identifiers: a prefix that names the thing, then a suffix that sorts by time."""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_TIME_BITS, _RANDOM_BITS = 48, 82


def new(prefix: str) -> str:
    """`prefix` + 26 characters: 48 bits of milliseconds, 82 random ones. `new("file-")`, `new("upload_")`."""
    number = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    digits = (number >> shift & 31 for shift in range(_TIME_BITS + _RANDOM_BITS - 5, -1, -5))
    return prefix + "".join(_ALPHABET[digit] for digit in digits)
