"""One request on its way: the prompt, what has been said so far, and when it is over. No torch here."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from app.core.engine import Chunk, FinishReason, GenerateRequest, TokenLogprob, ToldToken
from worker.inference.detokenise import Detokeniser, StopStrings
from worker.inference.pages import KeyChain
from worker.inference.vocabulary import Vocabulary

Emit = Callable[[Chunk], None]


class Choice(NamedTuple):
    """A next token, and where it was asked for its log-probability and the likeliest tokens with theirs."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sequence:
    """Token ids come in by `accept`, chunks go out by `emit`.

    `adapters` are whatever the runner understands, each with how much it counts; none for the base. `seed` is that of a KeyChain.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        vocabulary: Vocabulary,
        max_tokens: int,
        emit: Emit,
        adapters: tuple[tuple[object, float], ...] = (),
        seed: bytes = b"",
    ) -> None:
        self.request_id, self.tenant, self.sampling, self.adapters = (
            request.request_id,
            request.tenant,
            request.sampling,
            adapters,
        )
        self.tokens = list(request.prompt)
        self.pages: list[int] = []  # of the cache, for the tokens in their order
        self.made_at = time.perf_counter()
        self.began_at: float | None = None  # when a step first read of it
        self.computed = 0  # tokens whose keys and values those pages hold
        self.cached_tokens = 0  # of the prompt, those that were found there
        self._chain = KeyChain(seed)
        self.finish_reason: FinishReason | None = None
        self._has_failed = False
        self._prompt_tokens, self._max_tokens = len(request.prompt), max_tokens
        self._vocabulary, self._emit = vocabulary, emit
        self._text, self._stops = Detokeniser(vocabulary.tokenizer), StopStrings(request.sampling.stop)
        self.said = Counter[int]()  # how often each token has been said in the answer
        self.constraint = None if self.sampling.json_schema is None else vocabulary.constraint(self.sampling.json_schema)
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

    def page_names(self, size: int, count: int) -> list[bytes]:
        return self._chain.of(self.tokens, size=size, count=count)

    def draw(self) -> float:
        """The next number in [0, 1) of this request's own source, so that neighbours in a batch change nothing."""
        return self._random.random()

    def accept(self, choice: Choice) -> None:
        """The model's next token. The one that ends the turn is counted but is no text."""
        token = choice.token
        self.tokens.append(token)
        self.said[token] += 1
        is_end = token in self._vocabulary.stop_ids
        if self.constraint and not is_end:
            self.constraint.accept(token)
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
        told = () if is_end or self.sampling.top_logprobs is None else (self._told(choice),)
        self._emit(
            Chunk(
                text=text,
                tokens=told,
                finish_reason=self.finish_reason,
                completion_tokens=self.completion_tokens,
                cached_tokens=self.cached_tokens,
            )
        )

    def _told(self, choice: Choice) -> ToldToken:
        spell = self._vocabulary.spell
        top = tuple(TokenLogprob(bytes=tuple(spell(token)), logprob=logprob) for token, logprob in choice.top)
        return ToldToken(bytes=tuple(spell(choice.token)), logprob=choice.logprob, top=top)

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
