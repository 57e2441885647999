"""Rows that say what another row says: within the training file, and in the validation file of what is trained on.

Exact: the same tokens with the same ones trained. Near: of what users and assistants say, the sets of shingles (3 tokens in a
row) have a Jaccard similarity of at least 0.8. Pairs to look at are found by MinHash in 16 bands of 5 (Leskovec, Rajaraman,
Ullman: Mining of Massive Datasets, chapter 3) and then compared exactly. Shingles that stand in more than a tenth of all rows,
and in more than 10, are left out: a prompt that every row begins with would make all rows alike.

What is kept of each row lies in files, and is looked at a part at a time: memory does not grow with the number of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.core.data import MAX_LISTED
from app.core.data_report import Comparison, Likeness, Match, Matches
from app.core.render import SPEAKERS
from app.core.tokens.token_file import Block, TokenReader

FORMAT: Final = 1  # another number compares all anew
NEAR: Final = 0.8
SHINGLE: Final = 3
BANDS, HASHES = 16, 5
LEAST_SHINGLES = 8  # fewer say too little to be alike
COMMON_PART, COMMON_LEAST = 0.1, 10
TRIES = 4  # pairs of a row that are compared exactly, at most
MOST_PAIRS = 100_000  # of all rows: half a minute; who has found so many has found enough

_ROWS_AT_ONCE, _TOKENS_AT_ONCE, _KEYS_AT_ONCE = 65_536, 262_144, 1 << 20
_COUNTERS = 1 << 20
_PEOPLE = SPEAKERS.index("user")  # and all after it: what the template and the system say is no row's own
_NOTHING, _EXACT, _NEAR = range(3)

Words = NDArray[np.uint64]


def compare(training: TokenReader, validation: TokenReader | None = None, *, folder: Path) -> Comparison:
    """Looks at every row of both files. What it keeps of them meanwhile lies in `folder`: about 150 bytes a row."""
    files = [training] if validation is None else [training, validation]
    with TemporaryDirectory(dir=folder) as inner:
        rows = _Rows(files, Path(inner))
        rows.sign()
        rows.match_exact()
        rows.match_near()
        return Comparison(
            training=rows.likeness(0, training.examples),
            leaked=rows.likeness(training.examples, rows.count) if validation else None,
            compared=rows.compared,
            boilerplate=rows.common_shingles / max(1, rows.shingles),
            is_whole=rows.pairs < MOST_PAIRS,
        )


class _Rows:
    """The rows of all files in one order: those of the second file come after those of the first."""

    def __init__(self, files: list[TokenReader], folder: Path) -> None:
        self._files, self._folder = files, folder
        self._starts = np.cumsum([0, *(file.examples for file in files)])
        self.count = int(self._starts[-1])
        self.shingles = self.common_shingles = self.compared = self.pairs = 0
        state = np.dtype([("kind", np.uint8), ("tries", np.uint8), ("of", np.int64), ("similarity", np.float32)], align=True)
        self._state: Any = np.memmap(folder / "state", state, mode="w+", shape=(max(1, self.count),))
        self._is_common = self._find_common()

    def sign(self) -> None:
        """Write a key per row for the whole of it and one for each band; 0 where there is nothing to compare."""
        paths = [self._folder / name for name in ("exact", *map(str, range(BANDS)))]
        files = [path.open("wb") for path in paths]
        for block in self._blocks():
            files[0].write(_exact_keys(block).tobytes())
            shingles = self._telling(_shingles(block))
            self.compared += int((shingles.counts_B >= LEAST_SHINGLES).sum())
            for file, keys in zip(files[1:], _band_keys(shingles), strict=True):
                file.write(keys.tobytes())
        for file in files:
            file.close()

    def match_exact(self) -> None:
        for rows, firsts in self._alike("exact"):
            self._note(rows, firsts, _EXACT, 1.0)

    def match_near(self) -> None:
        for band in range(BANDS):
            for rows, firsts in self._alike(str(band)):
                is_open = (self._state["kind"][rows] == _NOTHING) & (self._state["tries"][rows] < TRIES)
                for row, first in zip(rows[is_open].tolist(), firsts[is_open].tolist(), strict=True):
                    if self.pairs == MOST_PAIRS:
                        return
                    self.pairs += 1
                    similarity = self._similarity(row, first)
                    self._state["tries"][row] += 1
                    if similarity >= NEAR:
                        self._note(row, first, _NEAR, similarity)

    def likeness(self, start: int, end: int) -> Likeness:
        """Of the rows from `start` to `end`."""
        kinds = self._state["kind"][start:end]

        def matches(kind: int) -> Matches:
            rows = start + np.flatnonzero(kinds == kind)
            return Matches(count=len(rows), listed=tuple(self._match(row) for row in rows[:MAX_LISTED].tolist()))

        return Likeness(exact=matches(_EXACT), near=matches(_NEAR))

    def _alike(self, name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Rows that share a key with one of the first file, and the first such: what validation repeats of itself is no leak."""
        for rows, firsts in _alike(self._folder / name):
            is_of_first_file = firsts < self._starts[1]
            yield rows[is_of_first_file], firsts[is_of_first_file]

    def _note(self, rows: Any, firsts: Any, kind: int, similarity: float) -> None:
        self._state["kind"][rows] = kind
        self._state["of"][rows] = firsts
        self._state["similarity"][rows] = similarity

    def _match(self, row: int) -> Match:
        line, of = self._line(row), int(self._state["of"][row])
        return Match(line=line, of_line=self._line(of), similarity=round(float(self._state["similarity"][row]), 3))

    def _line(self, row: int) -> int:
        file, example = self._place(row)
        return file.line(example)

    def _place(self, row: int) -> tuple[TokenReader, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[number], row - int(self._starts[number])

    def _blocks(self) -> Iterator[Block]:
        for file in self._files:
            yield from file.blocks(examples=_ROWS_AT_ONCE, tokens=_TOKENS_AT_ONCE)

    def _find_common(self) -> NDArray[np.bool_]:
        """Of each counter, whether its shingles are boilerplate. Shingles share counters, which matters only for rare ones."""
        counters = np.zeros(_COUNTERS, np.uint32)
        for block in self._blocks():
            shingles = _shingles(block)
            # once a row: by row and counter, and of equal neighbours the first
            places = np.sort(shingles.rows_S.astype(np.uint64) * np.uint64(_COUNTERS) + shingles.counters_S)
            is_first = np.concatenate([[True], places[1:] != places[:-1]]) if len(places) else np.zeros(0, np.bool_)
            np.add.at(counters, (places[is_first] % np.uint64(_COUNTERS)).astype(np.int64), 1)
        return counters > max(COMMON_LEAST, COMMON_PART * self.count)

    def _telling(self, shingles: "_Shingles") -> "_Shingles":
        is_telling = ~self._is_common[shingles.counters_S]
        self.shingles += len(is_telling)
        self.common_shingles += len(is_telling) - int(is_telling.sum())
        return shingles.only(is_telling)

    def _similarity(self, row: int, other: int) -> float:
        one, two = (self._set(place) for place in (row, other))
        both = len(np.intersect1d(one, two, assume_unique=True))
        return both / (len(one) + len(two) - both)

    def _set(self, row: int) -> Words:
        file, example = self._place(row)
        shingles = _shingles(file.block(example))
        return np.unique(shingles.hashes_S[~self._is_common[shingles.counters_S]])


@dataclass(frozen=True)
class _Shingles:
    """S shingles of the B rows of a block, in order: each one's hash and the row it is of."""

    hashes_S: Words
    rows_S: NDArray[np.int64]
    rows: int

    @property
    def counters_S(self) -> Words:
        return self.hashes_S % np.uint64(_COUNTERS)

    @property
    def counts_B(self) -> NDArray[np.int64]:
        return np.bincount(self.rows_S, minlength=self.rows)

    def only(self, chosen_S: NDArray[np.bool_]) -> "_Shingles":
        return _Shingles(self.hashes_S[chosen_S], self.rows_S[chosen_S], self.rows)


def _shingles(block: Block) -> _Shingles:
    is_said = block.speakers_N >= _PEOPLE
    rows = np.repeat(np.arange(len(block.lengths_B)), block.lengths_B)[is_said]
    tokens = block.tokens_N[is_said].astype(np.uint64)
    count = max(0, len(tokens) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(SHINGLE):
        hashes = _mixed(hashes + tokens[place : place + count])
    within = rows[:count] == rows[SHINGLE - 1 :]
    return _Shingles(hashes[within], rows[:count][within], len(block.lengths_B))


def _exact_keys(block: Block) -> Words:
    """A sum over mixed (token, whether it is trained, position): equal rows have equal keys, others by accident of 2^-64."""
    positions = np.arange(len(block.tokens_N)) - np.repeat(block.offsets_B1[:-1], block.lengths_B)
    words = block.tokens_N.astype(np.uint64) | (positions.astype(np.uint64) << np.uint64(32))
    words |= block.is_trained_N.astype(np.uint64) << np.uint64(63)
    return _never_0(np.add.reduceat(_mixed(words), block.offsets_B1[:-1]))


def _band_keys(shingles: _Shingles) -> Iterator[Words]:
    """For each band a key of every row: rows that share it have the same least hashes there."""
    counts_B = shingles.counts_B
    chosen = counts_B >= LEAST_SHINGLES
    of_chosen = shingles.only(chosen[shingles.rows_S])
    starts = np.cumsum([0, *counts_B[chosen][:-1]]) if chosen.any() else np.zeros(0, np.int64)
    hashes = (of_chosen.hashes_S >> np.uint64(32)).astype(np.uint32)
    seeds = np.random.default_rng(BANDS * HASHES).integers(2**32, size=(BANDS, HASHES, 2), dtype=np.uint32)
    for band in range(BANDS):
        keys = np.zeros(len(starts), np.uint64)
        for xor, factor in seeds[band]:
            least = np.minimum.reduceat((hashes ^ xor) * (factor | np.uint32(1)), starts) if len(starts) else hashes[:0]
            keys = _mixed(keys + least)
        keys_B = np.zeros(len(counts_B), np.uint64)
        keys_B[chosen] = _never_0(keys)
        yield keys_B


def _alike(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows whose key another row has before them, and the first such row. A part of all keys at a time."""
    parts = path.stat().st_size // 8 // _KEYS_AT_ONCE + 1
    for part in range(parts):
        keys, rows = _of_part(path, part, parts)
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
        firsts = rows[is_first][np.cumsum(is_first) - 1]
        yield rows[~is_first], firsts[~is_first]


def _of_part(path: Path, part: int, parts: int) -> tuple[Words, NDArray[np.int64]]:
    keys, rows, first = [], [], 0
    with path.open("rb") as file:
        while len(read := np.fromfile(file, np.uint64, _KEYS_AT_ONCE)):
            chosen = np.flatnonzero((read % np.uint64(parts) == part) & (read != 0))
            keys.append(read[chosen])
            rows.append(first + chosen)
            first += len(read)
    return np.concatenate([*keys, np.zeros(0, np.uint64)]), np.concatenate([*rows, np.zeros(0, np.int64)])


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection that spreads every bit over all."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _never_0(keys: Words) -> Words:
    return np.where(keys == 0, np.uint64(1), keys)
