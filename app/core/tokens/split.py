"""Holding back a part of the examples for validation."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.core.data_report import SetReport, SplitReport
from app.core.tokens import tokenise
from app.core.tokens.token_file import TokenReader, TokenWriter

_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 4096, 262_144


class NothingLeft(ValueError):
    """The part asked for leaves nothing to train on."""


def split(examples: TokenReader, part: float | int, *, seed: int, kept: Path, held_back: Path) -> SplitReport:
    """Write two files: what is trained on, and what is held back, a fraction of the examples or a number of them.

    The seed decides, with what is in an example and not where it stands: equal ones are neighbours in the order that
    is cut, and a file with its rows in another order is split alike. Raises NothingLeft.
    """
    count = part if isinstance(part, int) else max(1, round(part * examples.examples))
    if count >= examples.examples:
        raise NothingLeft(f"{count} of {examples.examples} usable rows would be held back, and nothing left to train on")
    is_held_E = np.zeros(examples.examples, np.bool_)
    is_held_E[np.argsort(_ranks(examples, seed), kind="stable")[:count]] = True
    return SplitReport(kept=_write(examples, ~is_held_E, kept), held_back=_write(examples, is_held_E, held_back))


def _ranks(examples: TokenReader, seed: int) -> NDArray[np.uint64]:
    key = seed.to_bytes(8, "little")
    digests = b"".join(
        hashlib.blake2b(block.tokens_N[span].tobytes(), key=key, digest_size=8).digest()
        for block in examples.blocks(examples=_ROWS_AT_ONCE, tokens=_TOKENS_AT_ONCE)
        for span in block.spans()
    )
    return np.frombuffer(digests, "<u8")


def _write(examples: TokenReader, chosen_E: NDArray[np.bool_], into: Path) -> SetReport:
    tokens = trained = longest = good = bad = 0
    with TokenWriter(into) as writer:
        for block in examples.blocks(examples=_ROWS_AT_ONCE, tokens=_TOKENS_AT_ONCE):
            part = block.only(chosen_E[block.first : block.first + len(block.lengths_B)])
            writer.append_block(part)
            tokens += len(part.tokens_N)
            trained += int(part.is_trained_N.sum())
            good += int((part.ratings_B > 0).sum())
            bad += int((part.ratings_B < 0).sum())
            longest = max(longest, int(part.lengths_B.max(initial=0)))
        writer.finish(tokenise.NOTHING_LOST)  # the halves lost nothing: what was left out is told of the whole
    return SetReport(
        examples=int(chosen_E.sum()),
        tokens=tokens,
        trained_tokens=trained,
        longest=longest,
        rated_good=good,
        rated_bad=bad,
    )
