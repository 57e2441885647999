"""A base's tokens as bytes, and JSON schemas over them. No torch here; llguidance does the work."""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from app.core.errors import BadRequest
from app.core.structure import SchemaRefused, grammar_of

_SPECIAL = b"\xff"  # llguidance writes it before the names of tokens that are no text


class Vocabulary:
    """`size` counts the model's rows: there may be more than the tokenizer has tokens."""

    def __init__(self, tokenizer: Tokenizer, *, size: int, stop_ids: Collection[int]) -> None:
        self.tokenizer, self.stop_ids, self.size = tokenizer, stop_ids, size

    def spell(self, token: int) -> bytes:
        """A token's bytes; of one that is no text its name."""
        return bytes(self._known.decode_bytes([token])).removeprefix(_SPECIAL)

    def constraint(self, schema: Mapping[str, Any]) -> "Constraint":
        """Raises BadRequest."""
        try:
            return Constraint(LLMatcher(self._known, grammar_of(schema)), self.size)
        except SchemaRefused as error:
            raise BadRequest(f"the JSON schema cannot be used: {error}", param="response_format") from None

    def prepare(self) -> None:
        """Now what takes half a second at first use."""
        self._known  # noqa: B018  # a cached property

    @cached_property
    def _known(self) -> LLTokenizer:
        return LLTokenizer(self.tokenizer.to_str(), n_vocab=self.size, eos_token=sorted(self.stop_ids))


class Constraint:
    """One answer on its way through a schema."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher, self._size = matcher, size

    @property
    def allowed_V(self) -> NDArray[np.bool_]:
        """Tokens that may come next; the end of the turn is among them where the text is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._size].astype(np.bool_)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
