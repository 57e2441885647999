"""Holding back a part of the examples for validation."""

import hashlib
from dataclasses import replace

from worker.training.tokenise import TokenisedSet


class NothingLeft(ValueError):
    """The part asked for leaves nothing to train on."""


def split(examples: TokenisedSet, part: float | int, *, seed: int) -> tuple[TokenisedSet, TokenisedSet]:
    """What is trained on, and what is held back: a fraction of the examples, or a number of them. Raises NothingLeft.

    The seed decides, with what is in an example and not where it stands: equal ones are neighbours in the order that
    is cut, and a file with its rows in another order is split alike.
    """
    count = part if isinstance(part, int) else max(1, round(part * examples.examples))
    if count >= examples.examples:
        raise NothingLeft(f"{count} of {examples.examples} usable rows would be held back, and nothing left to train on")
    order = sorted(range(examples.examples), key=lambda index: _rank(examples, index, seed))
    held, kept = sorted(order[:count]), sorted(order[count:])
    validation = replace(examples.take(held), dropped=(), dropped_count=0, truncated=(), truncated_count=0)
    return examples.take(kept), validation


def _rank(examples: TokenisedSet, index: int, seed: int) -> bytes:
    start, end = examples.offsets_E1[index : index + 2]
    return hashlib.blake2b(examples.tokens_N[start:end].tobytes(), key=seed.to_bytes(8, "little"), digest_size=16).digest()
