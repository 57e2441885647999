"""What a token set is known by: the bytes it comes from, and all that decides what becomes of them."""

import hashlib
import json
from importlib.metadata import version
from typing import Final

from app.core.spec import LongRows
from app.core.tokens import duplicates, token_file

MASK: Final = "assistant turns of weight 1, each with its end-of-turn token"  # another policy, another word


def of_set(file_sha256: str, card_facts: bytes, *, max_seq_length: int, long_rows: LongRows) -> str:
    """A whole file's. `card_facts` is the base's `base.json`, which names tokenizer, templates and stop tokens."""
    release = version("tunesmith"), token_file.FORMAT
    return _digest(file_sha256, hashlib.sha256(card_facts).hexdigest(), max_seq_length, long_rows, MASK, *release)


def of_half(whole: str, name: str, part: float | int, seed: int) -> str:
    """That of what is trained on, or held back, when a file is split."""
    return _digest(name, whole, part, seed)


def of_likeness(*sets: str) -> str:
    """That of how alike the rows of these sets are."""
    return _digest("likeness", duplicates.FORMAT, *sets)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
