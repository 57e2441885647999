"""Messages to tokens: the one place. Training, preview and serving all come through here, so they cannot drift apart."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from app.core.chat import Message
from app.core.manifest import TokenVector

TOKENIZER, CARD = "tokenizer.json", "base.json"

_PROBES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how can I help?"}),
    (
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Größe: 12 cm\n\t日本 🙂"},
        {"role": "assistant", "content": '{"size_cm": 12}'},
        {"role": "user", "content": " and  double?"},
        {"role": "assistant", "content": '{"size_cm": 24}'},
    ),
)


class RenderError(ValueError):
    """This conversation cannot become training tokens with this template; the message says why."""


@dataclass(frozen=True)
class Example:
    """A rendered conversation. `is_trained[i]` says whether `tokens[i]` is to be predicted."""

    tokens: list[int]
    is_trained: list[bool]


def marked_template(family: str) -> str:
    """The family's chat template with `{% generation %}` around what the model says, end-of-turn token included."""
    return (files("app.core") / "templates" / f"{family}.jinja").read_text().removesuffix("\n")


class Renderer:
    """One base's tokenizer and chat template. Thread-safe: nothing is kept between calls."""

    def __init__(self, tokenizer: Tokenizer, template: str, stop_ids: Sequence[int], context_length: int) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.stop_ids = frozenset(stop_ids)
        special = (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.context_length = context_length

    @classmethod
    def open(cls, directory: Path) -> "Renderer":
        """From a base's card: a folder with `tokenizer.json` and `base.json`."""
        return cls.parse((directory / TOKENIZER).read_bytes(), (directory / CARD).read_bytes())

    @classmethod
    def parse(cls, tokenizer: bytes, card: bytes) -> "Renderer":
        """From the card's two files, as a worker publishes them."""
        facts = json.loads(card)
        return cls(Tokenizer.from_str(tokenizer.decode()), facts["template"], facts["stop_ids"], facts["context_length"])

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to and with the words that open the assistant's turn. Raises RenderError."""
        text, _ = self._render(messages, opens_turn=True)
        _require_whole(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation, with the special tokens the base wants before it. Raises RenderError."""
        _require_whole(text)
        return list(self.tokenizer.encode(text).ids)

    def example(self, messages: Sequence[Message]) -> Example:
        """Token ids and which of them are trained on: assistant turns of weight 1, each with its end-of-turn token.

        Raises RenderError when the template hides an assistant turn or its end: the model would never learn to stop.
        """
        text, spans = self._render(messages, opens_turn=False)
        said = [message for message in messages if message.role == "assistant"]
        if len(spans) != len(said):
            raise RenderError("the chat template does not show every assistant message")
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = list(encoding.ids), encoding.offsets
        is_trained, position = [False] * len(ids), 0
        for message, (start, end) in zip(said, spans, strict=True):
            while position < len(ids) and offsets[position][0] < start:
                position += 1
            first = position
            while position < len(ids) and offsets[position][1] <= end:
                position += 1
            if first == position or ids[position - 1] not in self.stop_ids:
                raise RenderError("the chat template does not end an assistant message with an end-of-turn token")
            is_trained[first:position] = [bool(message.weight)] * (position - first)
        return Example(ids, is_trained)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def vectors(self) -> tuple[TokenVector, ...]:
        """Fixed conversations and their token ids, for the manifest."""
        return tuple(TokenVector(messages=probe, tokens=tuple(self._tokens_of(probe))) for probe in _PROBES)

    def differs_from(self, vectors: Sequence[TokenVector]) -> bool:
        """Whether this renderer gives other ids than those an adapter was trained with."""
        return any(self._tokens_of(vector.messages) != list(vector.tokens) for vector in vectors)

    def differs_from_template(self, stock: str, variables: Mapping[str, str]) -> bool:
        """Whether the base's own template writes the probes differently from ours. `variables`: bos_token and the like."""
        for probe in _PROBES:
            texts: Any = render_jinja_template([list(probe)], chat_template=stock, **variables)[0]
            theirs = self.tokenizer.encode(texts[0], add_special_tokens=False).ids
            if theirs != self._tokens_of(probe):
                return True
        return False

    def _tokens_of(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.example([Message(role=m["role"], content=m["content"]) for m in messages]).tokens

    def _render(self, messages: Sequence[Message], *, opens_turn: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans of what the assistant says. Raises RenderError.

        Special tokens in what people write would end turns and forge others; and some templates drop what they do not expect.
        """
        for message in messages:
            if found := self._special.search(message.content):
                raise RenderError(f"a message holds the special token {found[0]}; write it differently")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        rendered: Any = render_jinja_template(
            [conversation], chat_template=self.template, add_generation_prompt=opens_turn, return_assistant_tokens_mask=True
        )
        (text,), (spans,) = rendered
        for message in messages:
            if message.content.strip() not in text:
                raise RenderError(f"the chat template leaves out a message of role {message.role}; move its text into another")
        return text, [(start, end) for start, end in spans]


def _require_whole(text: str) -> None:
    """JSON can write half of a surrogate pair, and no tokenizer can read it. Raises RenderError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RenderError("a text holds half of a surrogate pair; write the whole character") from None
