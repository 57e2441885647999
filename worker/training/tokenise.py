"""Chats to flat arrays of tokens, once per job. Needs numpy only: the cpu queue does this, and the API may look at it."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from app.core.chat import Chat
from app.core.data import MAX_LISTED, Problem
from app.core.fitting import fit
from app.core.render import Example, Renderer
from app.core.spec import LongRows

_ARRAYS = ("tokens_N", "is_trained_N", "offsets_E1", "lines_E")
_DROPPED, _TRUNCATED = "dropped", "truncated"


@dataclass(frozen=True)
class TokenisedSet:
    """Examples one after the other: example e is `tokens_N[offsets_E1[e] : offsets_E1[e + 1]]`, from line `lines_E[e]`.

    `is_trained_N[i]` says that token i is to be predicted; it is never the first of its example. `dropped` holds at most
    `MAX_LISTED` of the `dropped_count` rows that are not here, each with its reason; `truncated` of those whose beginning is not.
    """

    tokens_N: NDArray[np.int32]
    is_trained_N: NDArray[np.bool_]
    offsets_E1: NDArray[np.int64]
    lines_E: NDArray[np.int32]
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

    @cached_property
    def sha256(self) -> str:
        """Of what is trained on: the same rows give the same digest, whatever was dropped and wherever it was stored."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()

    def take(self, chosen: Sequence[int]) -> "TokenisedSet":
        """The examples of these numbers, in this order."""
        parts = [slice(*self.offsets_E1[index : index + 2]) for index in chosen]
        return replace(
            self,
            tokens_N=np.concatenate([self.tokens_N[part] for part in parts]),
            is_trained_N=np.concatenate([self.is_trained_N[part] for part in parts]),
            offsets_E1=np.cumsum([0, *(part.stop - part.start for part in parts)], dtype=np.int64),
            lines_E=self.lines_E[list(chosen)],
        )

    def write(self, path: Path) -> None:
        facts = {
            _DROPPED: _facts(self.dropped, self.dropped_count),
            _TRUNCATED: _facts(self.truncated, self.truncated_count),
        }
        save_file({name: getattr(self, name) for name in _ARRAYS}, path, metadata=facts)

    @classmethod
    def read(cls, path: Path) -> "TokenisedSet":
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            dropped, dropped_count = _told(file.metadata()[_DROPPED])
            truncated, truncated_count = _told(file.metadata().get(_TRUNCATED, _NOTHING))  # release 0.1.0 cut nothing
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        return cls(
            **arrays,
            dropped=dropped,
            dropped_count=dropped_count,
            truncated=truncated,
            truncated_count=truncated_count,
        )


def tokenise(chats: Iterable[Chat], renderer: Renderer, *, max_seq_length: int, long_rows: LongRows = "drop") -> TokenisedSet:
    """Render and tokenise every chat. Rows that cannot be trained on are left out, counted and named.

    A row that is too long is one of them, unless `long_rows` lets it lose its beginning; answers are never cut: that
    would teach a model that they have no end.
    """
    examples, lines = list[Example](), list[int]()
    dropped, truncated = list[Problem](), list[Problem]()
    for chat in chats:
        fitted = fit(chat, renderer, max_tokens=max_seq_length, long_rows=long_rows)
        if fitted.example:
            examples.append(fitted.example)
            lines.append(chat.line)
        if fitted.problem:
            (truncated if fitted.example else dropped).append(fitted.problem)
    lengths = [len(example.tokens) for example in examples]
    return TokenisedSet(
        tokens_N=np.fromiter((token for example in examples for token in example.tokens), np.int32, sum(lengths)),
        is_trained_N=np.fromiter((flag for example in examples for flag in example.is_trained), np.bool_, sum(lengths)),
        offsets_E1=np.cumsum([0, *lengths], dtype=np.int64),
        lines_E=np.array(lines, dtype=np.int32),
        dropped=tuple(dropped[:MAX_LISTED]),
        dropped_count=len(dropped),
        truncated=tuple(truncated[:MAX_LISTED]),
        truncated_count=len(truncated),
    )


def _facts(listed: Sequence[Problem], count: int) -> str:
    return json.dumps({"count": count, "listed": [problem.model_dump() for problem in listed]})


def _told(facts: str) -> tuple[tuple[Problem, ...], int]:
    read = json.loads(facts)
    return tuple(Problem.model_validate(problem) for problem in read["listed"]), read["count"]


_NOTHING = _facts((), 0)
