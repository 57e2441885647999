"""Chats to flat arrays of tokens, once per job. Needs numpy only: the cpu queue does this, and the API may look at it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from app.core.chat import MAX_LISTED, Chat, Problem
from app.core.render import Example, Renderer, RenderError

_ARRAYS = ("tokens_N", "is_trained_N", "offsets_E1", "lines_E")
_DROPPED = "dropped"


@dataclass(frozen=True)
class TokenisedSet:
    """Examples one after the other: example e is `tokens_N[offsets_E1[e] : offsets_E1[e + 1]]`, from line `lines_E[e]`.

    `is_trained_N[i]` says that token i is to be predicted; it is never the first of its example. `dropped` holds at most
    `MAX_LISTED` of the `dropped_count` rows that are not here, each with its reason.
    """

    tokens_N: NDArray[np.int32]
    is_trained_N: NDArray[np.bool_]
    offsets_E1: NDArray[np.int64]
    lines_E: NDArray[np.int32]
    dropped: tuple[Problem, ...] = ()
    dropped_count: int = 0

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

    def write(self, path: Path) -> None:
        facts = {"count": self.dropped_count, "listed": [problem.model_dump() for problem in self.dropped]}
        save_file({name: getattr(self, name) for name in _ARRAYS}, path, metadata={_DROPPED: json.dumps(facts)})

    @classmethod
    def read(cls, path: Path) -> "TokenisedSet":
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            facts = json.loads(file.metadata()[_DROPPED])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        dropped = tuple(Problem.model_validate(problem) for problem in facts["listed"])
        return cls(**arrays, dropped=dropped, dropped_count=facts["count"])


def tokenise(chats: Iterable[Chat], renderer: Renderer, *, max_seq_length: int) -> TokenisedSet:
    """Render and tokenise every chat. Rows that cannot be trained on are left out, counted and named, never cut:

    a cut row would lose its answer, or teach a model that answers have no end.
    """
    examples, lines, dropped = list[Example](), list[int](), list[Problem]()
    for chat in chats:
        example = _example(chat, renderer, max_seq_length)
        if isinstance(example, Problem):
            dropped.append(example)
        else:
            examples.append(example)
            lines.append(chat.line)
    lengths = [len(example.tokens) for example in examples]
    return TokenisedSet(
        tokens_N=np.fromiter((token for example in examples for token in example.tokens), np.int32, sum(lengths)),
        is_trained_N=np.fromiter((flag for example in examples for flag in example.is_trained), np.bool_, sum(lengths)),
        offsets_E1=np.cumsum([0, *lengths], dtype=np.int64),
        lines_E=np.array(lines, dtype=np.int32),
        dropped=tuple(dropped[:MAX_LISTED]),
        dropped_count=len(dropped),
    )


def _example(chat: Chat, renderer: Renderer, max_seq_length: int) -> Example | Problem:
    try:
        example = renderer.example(chat.messages)
    except RenderError as error:
        return Problem(line=chat.line, code="row_not_rendered", message=str(error))
    if len(example.tokens) > max_seq_length:
        message = f"the row has {len(example.tokens)} tokens; at most {max_seq_length} are trained on"
        return Problem(line=chat.line, code="row_too_long", message=message)
    example.is_trained[0] = False  # nothing stands before it to predict it from
    if not any(example.is_trained):
        return Problem(line=chat.line, code="nothing_to_train", message="no token of the row is to be predicted")
    return example
