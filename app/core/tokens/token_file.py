"""Tokenised examples on disk, written and read a piece at a time: memory does not grow with the file.

A file is safetensors with the arrays of `TokenisedSet`, and with whose each token is. Trainers read it whole.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from app.core.render import Example

FORMAT = 4  # another number makes every file anew
_KINDS: dict[str, tuple[DTypeLike, str]] = {  # the widest first, so that each array is aligned
    "offsets_E1": (np.int64, "I64"),
    "tokens_N": (np.int32, "I32"),
    "lines_E": (np.int32, "I32"),
    "seconds_E": (np.int32, "I32"),
    "is_trained_N": (np.bool_, "BOOL"),
    "speakers_N": (np.uint8, "U8"),
    "ratings_E": (np.int8, "I8"),
}


class TokenWriter:
    """Collects examples beside `path`, in a folder that is gone when the block ends; `finish` makes the file of them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory(dir=self._path.parent)
        self._parts = {name: (Path(self._folder.name) / name).open("wb") for name in _KINDS}
        self._tokens = 0
        self._put("offsets_E1", [0])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for part in self._parts.values():
            part.close()
        self._folder.cleanup()

    def append(self, examples: Sequence[Example], lines: Sequence[int]) -> None:
        ends_E = self._tokens + np.cumsum([len(example.tokens) for example in examples], dtype=np.int64)
        self._tokens = int(ends_E[-1]) if len(ends_E) else self._tokens
        self._put("offsets_E1", ends_E)
        self._put("tokens_N", list(chain.from_iterable(example.tokens for example in examples)))
        self._put("is_trained_N", list(chain.from_iterable(example.is_trained for example in examples)))
        self._put("lines_E", lines)
        self._put("seconds_E", [example.second for example in examples])
        self._put("ratings_E", [example.rating for example in examples])
        self._parts["speakers_N"].write(b"".join(example.speakers for example in examples))

    def append_block(self, block: "Block") -> None:
        self._put("offsets_E1", self._tokens + block.offsets_B1[1:])
        self._tokens += len(block.tokens_N)
        self._put("tokens_N", block.tokens_N)
        self._put("is_trained_N", block.is_trained_N)
        self._put("lines_E", block.lines_B)
        self._put("seconds_E", block.seconds_B)
        self._put("ratings_E", block.ratings_B)
        self._put("speakers_N", block.speakers_N)

    def finish(self, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, part in self._parts.items():
            kind, label = _KINDS[name]
            size = part.tell()
            header[name] = {
                "dtype": label,
                "shape": [size // np.dtype(kind).itemsize],
                "data_offsets": [position, position + size],
            }
            position += size
            part.close()
        said = json.dumps(header).encode()
        said += b" " * (-len(said) % 8)
        with self._path.open("wb") as file:
            file.write(len(said).to_bytes(8, "little") + said)
            for part in self._parts.values():
                with Path(part.name).open("rb") as written:
                    shutil.copyfileobj(written, file)

    def _put(self, name: str, values: Any) -> None:
        self._parts[name].write(np.asarray(values, dtype=_KINDS[name][0]).tobytes())


@dataclass(frozen=True)
class Block:
    """Consecutive examples from `first` on; those of B are at `offsets_B1[b] : offsets_B1[b + 1]` of the others."""

    first: int
    offsets_B1: NDArray[np.int64]
    tokens_N: NDArray[np.int32]
    is_trained_N: NDArray[np.bool_]
    speakers_N: NDArray[np.uint8]
    lines_B: NDArray[np.int32]
    seconds_B: NDArray[np.int32]
    ratings_B: NDArray[np.int8]

    @property
    def lengths_B(self) -> NDArray[np.int64]:
        return np.diff(self.offsets_B1)

    def spans(self) -> Iterator[slice]:
        """Where each example lies."""
        for start, end in zip(self.offsets_B1[:-1], self.offsets_B1[1:], strict=True):
            yield slice(int(start), int(end))

    def only(self, chosen_B: NDArray[np.bool_]) -> "Block":
        """Some of the examples. They are no longer neighbours, so that `first` says nothing of them."""
        chosen_N = np.repeat(chosen_B, self.lengths_B)
        return Block(
            first=self.first,
            offsets_B1=np.concatenate([[0], np.cumsum(self.lengths_B[chosen_B])]),
            tokens_N=self.tokens_N[chosen_N],
            is_trained_N=self.is_trained_N[chosen_N],
            speakers_N=self.speakers_N[chosen_N],
            lines_B=self.lines_B[chosen_B],
            seconds_B=self.seconds_B[chosen_B],
            ratings_B=self.ratings_B[chosen_B],
        )


class TokenReader:
    """Reads what a `TokenWriter` wrote."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        size = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(size))
        self._starts = {name: 8 + size + int(header[name]["data_offsets"][0]) for name in _KINDS}
        self.examples = int(header["lines_E"]["shape"][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def blocks(self, *, examples: int, tokens: int) -> Iterator[Block]:
        """All examples in order, at most so many at once; one with more tokens than that comes alone."""
        first = 0
        while first < self.examples:
            offsets = self._read("offsets_E1", first, min(examples, self.examples - first) + 1)
            count = max(1, int(np.searchsorted(offsets, offsets[0] + tokens, side="right")) - 1)
            yield self._block(first, offsets[: count + 1])
            first += count

    def block(self, example: int) -> Block:
        """One example alone."""
        return self._block(example, self._read("offsets_E1", example, 2))

    def line(self, example: int) -> int:
        return int(self._read("lines_E", example, 1)[0])

    def _block(self, first: int, offsets_B1: NDArray[np.int64]) -> Block:
        start, count = int(offsets_B1[0]), int(offsets_B1[-1] - offsets_B1[0])
        tokens_N, is_trained_N, speakers_N = (
            self._read(name, start, count) for name in ("tokens_N", "is_trained_N", "speakers_N")
        )
        lines_B, seconds_B, ratings_B = (
            self._read(name, first, len(offsets_B1) - 1) for name in ("lines_E", "seconds_E", "ratings_E")
        )
        return Block(first, offsets_B1 - start, tokens_N, is_trained_N, speakers_N, lines_B, seconds_B, ratings_B)

    def _read(self, name: str, start: int, count: int) -> NDArray[Any]:
        kind = np.dtype(_KINDS[name][0])
        self._file.seek(self._starts[name] + start * kind.itemsize)
        return np.frombuffer(self._file.read(count * kind.itemsize), kind)
