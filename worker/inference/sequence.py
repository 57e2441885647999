"""One request on its way: the prompt, what has been said so far, and when it is over. No torch here."""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tokenizers import Tokenizer

from app.core.engine import Chunk, FinishReason, GenerateRequest
from worker.inference.detokenise import Detokeniser, StopStrings

Emit = Callable[[Chunk], None]


class Sequence:
    """Token ids come in by `accept`, chunks go out by `emit`. `adapter` is whatever the runner understands, None for the base."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        max_tokens: int,
        emit: Emit,
        adapter: object | None = None,
    ) -> None:
        self.request_id, self.sampling, self.adapter = request.request_id, request.sampling, adapter
        self.tokens = list(request.prompt)
        self.computed = 0  # tokens whose keys and values the cache holds
        self.finish_reason: FinishReason | None = None
        self._has_failed = False
        self._prompt_tokens, self._max_tokens = len(request.prompt), max_tokens
        self._stop_ids, self._emit = stop_ids, emit
        self._text, self._stops = Detokeniser(tokenizer), StopStrings(request.sampling.stop)
        self._random = random.Random(request.sampling.seed)

    @property
    def remaining(self) -> int:
        """Tokens the model has yet to read before it can say the next one: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self._prompt_tokens

    @property
    def is_over(self) -> bool:
        return self._has_failed or self.finish_reason is not None

    def draw(self) -> float:
        """The next number in [0, 1) of this request's own source, so that neighbours in a batch change nothing."""
        return self._random.random()

    def accept(self, token: int) -> None:
        """The model's next token. The one that ends the turn is counted but is no text."""
        self.tokens.append(token)
        is_end = token in self._stop_ids
        text = self._stops.push("" if is_end else self._text.push(token))
        if is_end or self._stops.is_found:
            self.finish_reason = "stop"
        elif self.completion_tokens >= self._max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._stops.push(self._text.flush())
            text += self._stops.flush()
        if self._stops.is_found:  # the last held-back text may be what completes a stop string
            self.finish_reason = "stop"
        self._emit(Chunk(text=text, finish_reason=self.finish_reason, completion_tokens=self.completion_tokens))

    def fail(self, message: str) -> None:
        """End without an answer; what was said so far stands."""
        self._has_failed = True
        self._emit(Chunk(error=message, completion_tokens=self.completion_tokens))


@dataclass(frozen=True)
class Slice:
    """What one step reads of a sequence: `count` tokens from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.count]

    @property
    def is_last(self) -> bool:
        """Whether the next token is known after it; a long prompt takes several slices."""
        return self.start + self.count == len(self.sequence.tokens)
