"""Chats to flat arrays of tokens, once for a file and a base. Needs numpy only: the cpu queue does this."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from app.core.chat import Chat
from app.core.data import MAX_LISTED, Problem
from app.core.data_report import FileReport, LengthReport, SpeakerReport
from app.core.fitting import Fitted, fit_all
from app.core.render import SPEAKERS, Example, Renderer
from app.core.spec import LongRows
from app.core.tokens.token_file import TokenWriter

_ARRAYS = ("tokens_N", "is_trained_N", "offsets_E1", "lines_E")
_LATER = {"seconds_E": np.int32, "ratings_E": np.int8}  # that earlier releases did not write: all 0 then
_DROPPED, _TRUNCATED = "dropped", "truncated"
CHUNK_BYTES = 256 * 1024
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 512 * 1024  # an encoding takes hundreds of times the room of its text


@dataclass(frozen=True)
class TokenisedSet:
    """Examples one after the other: example e is `tokens_N[offsets_E1[e] : offsets_E1[e + 1]]`, from line `lines_E[e]`.

    Where `seconds_E[e]` is not 0, the example is a pair: from there on it is the document that the other is preferred to.
    `ratings_E[e]` is 1 for an answer that was called good, -1 for a bad one, 0 for one that was not rated.

    `is_trained_N[i]` says that token i is to be predicted; it is never the first of its document. `dropped` holds at most
    `MAX_LISTED` of the `dropped_count` rows that are not here, each with its reason; `truncated` of those whose beginning is not.
    """

    tokens_N: NDArray[np.int32]
    is_trained_N: NDArray[np.bool_]
    offsets_E1: NDArray[np.int64]
    lines_E: NDArray[np.int32]
    seconds_E: NDArray[np.int32]
    ratings_E: NDArray[np.int8]
    dropped: tuple[Problem, ...] = ()
    dropped_count: int = 0
    truncated: tuple[Problem, ...] = ()
    truncated_count: int = 0

    @property
    def examples(self) -> int:
        return len(self.lines_E)

    @property
    def tokens(self) -> int:
        return len(self.tokens_N)

    @property
    def labelled_tokens(self) -> int:
        return int(self.is_trained_N.sum())

    @cached_property
    def lengths_E(self) -> NDArray[np.int64]:
        return np.diff(self.offsets_E1)

    @property
    def longest(self) -> int:
        return int(self.lengths_E.max(initial=0))

    @property
    def pairs(self) -> int:
        return int(np.count_nonzero(self.seconds_E))

    @property
    def rated(self) -> int:
        return int(np.count_nonzero(self.ratings_E))

    def lengths_of(self, example: int) -> tuple[int, ...]:
        """Those of its documents."""
        length, second = int(self.lengths_E[example]), int(self.seconds_E[example])
        return (second, length - second) if second else (length,)

    @cached_property
    def sha256(self) -> str:
        """Of what is trained on: the same rows give the same digest, whatever was dropped and wherever it was stored."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(getattr(self, name).tobytes())
        for name in _LATER:
            if (array := getattr(self, name)).any():  # else it is what it was before there was such an array
                digest.update(array.tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        metadata = _metadata(self.dropped, self.dropped_count, self.truncated, self.truncated_count)
        save_file({name: getattr(self, name) for name in (*_ARRAYS, *_LATER)}, path, metadata=metadata)

    @classmethod
    def read(cls, path: Path) -> "TokenisedSet":
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            dropped, dropped_count = _told(file.metadata().get(_DROPPED, _NOTHING))
            truncated, truncated_count = _told(file.metadata().get(_TRUNCATED, _NOTHING))  # release 0.1.0 cut nothing
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            held = set(file.keys())
            for name, kind in _LATER.items():
                arrays[name] = file.get_tensor(name) if name in held else np.zeros(len(arrays["lines_E"]), kind)
        return cls(
            **arrays,
            dropped=dropped,
            dropped_count=dropped_count,
            truncated=truncated,
            truncated_count=truncated_count,
        )


def tokenise(chats: Iterable[Chat], renderer: Renderer, *, max_seq_length: int, long_rows: LongRows = "drop") -> TokenisedSet:
    """Render and tokenise every chat. Rows that cannot be trained on are left out, counted and named (see `app.core.fitting`)."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.safetensors"
        tokenise_to(path, chats, renderer, max_seq_length=max_seq_length, long_rows=long_rows)
        return TokenisedSet.read(path)


def tokenise_to(path: Path, chats: Iterable[Chat], renderer: Renderer, *, max_seq_length: int, long_rows: LongRows) -> FileReport:
    """The same into a file, a few rows at a time. Raises what `chats` raises, and leaves nothing then."""
    tally = _Tally()
    with TokenWriter(path) as writer:
        for batch in _batches(chats):
            rows = fit_all(batch, renderer, max_tokens=max_seq_length, long_rows=long_rows)
            kept = [(row.example, row.chat.line) for row in rows if row.example is not None]
            writer.append([example for example, _ in kept], [line for _, line in kept])
            for row in rows:
                tally.add(row)
        report = tally.report(max_seq_length, long_rows)
        writer.finish(_metadata(report.problems, report.left_out_count, report.cut, report.rows_cut))
    return report


def _batches(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    batch, size_bytes = list[Chat](), 0
    for chat in chats:
        of_chat = _size_bytes(chat)
        if batch and (len(batch) == _ROWS_AT_ONCE or size_bytes + of_chat > _BYTES_AT_ONCE):
            yield batch
            batch, size_bytes = [], 0
        batch.append(chat)
        size_bytes += of_chat
    if batch:
        yield batch


def _size_bytes(chat: Chat) -> int:
    """Of what a template writes of it: tools stand in every row."""
    messages = [message for side in chat.sides for message in side]
    said = sum(len(message.content.encode(errors="replace")) for message in messages)
    calls = [call.arguments for message in messages for call in message.tool_calls]
    said += len((chat.text or "").encode(errors="replace"))
    return said + (len(json.dumps([*chat.tools, *calls])) if chat.tools or calls else 0)


@dataclass
class _Tally:
    """Counts of all rows so far. A row is at most a line's bytes long, so that each length can have a counter of its own."""

    rows: int = 0
    examples: int = 0
    rows_cut: int = 0
    trained_tokens: int = 0
    longest: int = 0
    ratings: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    cut: list[Problem] = field(default_factory=list)

    def add(self, row: Fitted) -> None:
        self.rows += not row.is_further
        if row.length:
            self.lengths[row.length] += 1
        if row.example is not None:
            self._add_example(row, row.example)
        if row.problem is not None:
            listed = self.problems if row.example is None else self.cut
            if row.example is None:
                self.left_out[row.problem.code] += 1
            else:
                self.rows_cut += 1
            if len(listed) < MAX_LISTED:
                listed.append(row.problem)

    def _add_example(self, row: Fitted, example: Example) -> None:
        self.examples += 1
        self.longest = max(self.longest, len(example.tokens))
        self.trained_tokens += sum(example.is_trained)
        self.ratings[example.rating] += 1
        for number, speaker in enumerate(SPEAKERS):
            self.tokens[speaker] += example.speakers.count(number)
        self.messages.update(message.role for side in row.chat.sides for message in side)

    def report(self, max_seq_length: int, long_rows: LongRows) -> FileReport:
        return FileReport(
            rows=self.rows,
            examples=self.examples,
            tokens=self.tokens.total(),
            trained_tokens=self.trained_tokens,
            longest=self.longest,
            rated_good=self.ratings[1],
            rated_bad=self.ratings[-1],
            max_seq_length=max_seq_length,
            long_rows=long_rows,
            rows_too_long=sum(rows for length, rows in self.lengths.items() if length > max_seq_length),
            rows_cut=self.rows_cut,
            left_out=dict(self.left_out),
            problems=tuple(self.problems),
            cut=tuple(self.cut),
            lengths=_lengths(self.lengths),
            speakers={
                speaker: SpeakerReport(messages=self.messages[speaker], tokens=self.tokens[speaker])
                for speaker in SPEAKERS
                if self.tokens[speaker]
            },
        )


def _lengths(counts: Counter[int]) -> LengthReport | None:
    if not counts:
        return None
    lengths = sorted(counts)
    up_to = np.cumsum([counts[length] for length in lengths])

    def quantile(part: float) -> int:
        return lengths[int(np.searchsorted(up_to, part * up_to[-1]))]

    histogram = Counter[int]()
    for length, rows in counts.items():
        histogram[1 << (length - 1).bit_length()] += rows
    return LengthReport(
        shortest=lengths[0],
        median=quantile(0.5),
        p90=quantile(0.9),
        p99=quantile(0.99),
        longest=lengths[-1],
        histogram=dict(sorted(histogram.items())),
    )


def _metadata(
    dropped: Sequence[Problem], dropped_count: int, truncated: Sequence[Problem], truncated_count: int
) -> dict[str, str]:
    return {_DROPPED: _facts(dropped, dropped_count), _TRUNCATED: _facts(truncated, truncated_count)}


def _facts(listed: Sequence[Problem], count: int) -> str:
    return json.dumps({"count": count, "listed": [problem.model_dump() for problem in listed]})


def _told(facts: str) -> tuple[tuple[Problem, ...], int]:
    read = json.loads(facts)
    return tuple(Problem.model_validate(problem) for problem in read["listed"]), read["count"]


_NOTHING = _facts((), 0)
NOTHING_LOST = _metadata((), 0, (), 0)
