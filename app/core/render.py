"""Messages to tokens: the one place. Training, preview and serving all come through here, so they cannot drift apart."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2.exceptions import TemplateError
from tokenizers import Encoding, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from app.core.chat import Message
from app.core.manifest import TokenVector

TOKENIZER, CARD = "tokenizer.json", "base.json"
SPEAKERS: Final = ("template", "system", "user", "assistant")  # whose a token is, by number; all else is the template's

# for templates that date their prompts: tokens must be the same tomorrow, and this is the day they fall back to
_VARIABLES = {"date_string": "26 Jul 2024"}
_PROBES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how can I help?"}),
    (
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Größe: 12 cm\n\t日本 🙂"},
        {"role": "assistant", "content": '{"size_cm": 12}'},
        {"role": "user", "content": " and  double?"},
        {"role": "assistant", "content": '{"size_cm": 24}'},
    ),
    ({"role": "user", "content": "  white \n"}, {"role": "assistant", "content": "\n space  "}),  # some templates trim
)


class RenderError(ValueError):
    """This conversation cannot become training tokens with this template; the message says why."""


@dataclass(frozen=True)
class Example:
    """A rendered conversation. `is_trained[i]` says whether `tokens[i]` is to be predicted, `speakers[i]` whose it is."""

    tokens: list[int]
    is_trained: list[bool]
    speakers: bytes


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text, and where in it each message lies: an assistant's with its end-of-turn token."""

    messages: Sequence[Message]
    text: str
    spans: list[tuple[int, int]]


def marked_template(family: str) -> str:
    """The family's chat template with `{% generation %}` around what the model says, end-of-turn token included."""
    return (files("app.core") / "templates" / f"{family}.jinja").read_text().removesuffix("\n")


class Renderer:
    """One base's tokenizer and chat template. Thread-safe: nothing is kept between calls."""

    def __init__(self, tokenizer: Tokenizer, template: str, stop_ids: Sequence[int], context_length: int) -> None:
        tokenizer.no_padding()  # some bases' tokenizer.json cuts and fills up by itself
        tokenizer.no_truncation()
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
        text, _ = self._text(messages, opens_turn=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation, with the special tokens the base wants before it. Raises RenderError."""
        _require_whole(text)
        return list(self.tokenizer.encode(text).ids)

    def example(self, messages: Sequence[Message]) -> Example:
        """Token ids and which of them are trained on: assistant turns of weight 1, each with its end-of-turn token.

        Raises RenderError when the template hides an assistant turn or its end: the model would never learn to stop.
        """
        (made,) = self.examples([messages])
        if isinstance(made, RenderError):
            raise made
        return made

    def examples(self, conversations: Sequence[Sequence[Message]]) -> list[Example | RenderError]:
        """`example` of each, or why there is none. They are encoded side by side on all cores."""
        rendered = [self._try_render(messages) for messages in conversations]
        texts = [made.text for made in rendered if isinstance(made, _Rendered)]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [made if isinstance(made, RenderError) else self._example(made, next(encodings)) for made in rendered]

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of `example`, cut where tokens to be predicted begin and end. Raises RenderError."""
        rendered = self._render(messages)
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        flags = self.example(messages).is_trained
        firsts = [i for i in range(len(flags)) if i == 0 or flags[i] != flags[i - 1]]
        starts = [_start_of(encoding, i) for i in firsts]
        ends = [*starts[1:], len(rendered.text)]
        return [(rendered.text[start:end], flags[i]) for i, start, end in zip(firsts, starts, ends, strict=True)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def vectors(self) -> tuple[TokenVector, ...]:
        """Fixed conversations and their token ids, for the manifest."""
        return tuple(TokenVector(messages=probe, tokens=tuple(self._tokens_of(probe))) for probe in _PROBES)

    def differs_from(self, vectors: Sequence[TokenVector]) -> bool:
        """Whether this renderer gives other ids than those an adapter was trained with."""
        return any(self._tokens_of(vector.messages) != list(vector.tokens) for vector in vectors)

    def differs_from_template(self, stock: str, variables: Mapping[str, str]) -> bool:
        """Whether the base's own template writes the probes differently from ours. `variables`: bos_token and the like.

        Conversations are compared, and the prompts before their last answers.
        """
        asked = [(probe, False) for probe in _PROBES] + [(probe[:-1], True) for probe in _PROBES]
        compared = [
            self.tokenizer.encode(text, add_special_tokens=False).ids == self._tokens_of(messages, opens_turn=opens_turn)
            for messages, opens_turn in asked
            if (text := _stock_text(stock, messages, opens_turn=opens_turn, variables=variables)) is not None
        ]
        return not (compared and all(compared))

    def _tokens_of(self, conversation: Sequence[Mapping[str, str]], *, opens_turn: bool = False) -> list[int]:
        messages = [Message(role=m["role"], content=m["content"]) for m in conversation]
        return self.prompt(messages) if opens_turn else self.example(messages).tokens

    def _try_render(self, messages: Sequence[Message]) -> _Rendered | RenderError:
        try:
            return self._render(messages)
        except RenderError as error:
            return error

    def _render(self, messages: Sequence[Message]) -> _Rendered:
        """A whole conversation. Raises RenderError."""
        text, generated = self._text(messages, opens_turn=False)
        said = iter(generated)
        if len(generated) != sum(message.role == "assistant" for message in messages):
            raise RenderError("the chat template does not show every assistant message")
        spans, position = list[tuple[int, int]](), 0
        for message in messages:
            start, end = next(said) if message.role == "assistant" else _found(text, message.content.strip(), position)
            spans.append((start, end))
            position = end
        return _Rendered(messages, text, spans)

    def _text(self, messages: Sequence[Message], *, opens_turn: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans of what the assistant says. Raises RenderError.

        Special tokens in what people write would end turns and forge others; and some templates drop what they do not expect.
        """
        for message in messages:
            if found := self._special.search(message.content):
                raise RenderError(f"a message holds the special token {found[0]}; write it differently")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered: Any = render_jinja_template(
                [conversation], chat_template=self.template, add_generation_prompt=opens_turn, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise RenderError(f"the chat template refuses the conversation: {error}") from None
        (text,), (spans,) = rendered
        _require_whole(text)
        for message in messages:
            if message.content.strip() not in text:
                raise RenderError(f"the chat template leaves out a message of role {message.role}; move its text into another")
        return text, [(start, end) for start, end in spans]

    def _example(self, rendered: _Rendered, encoding: Encoding) -> Example | RenderError:
        ids = encoding.ids
        is_trained, speakers = [False] * len(ids), bytearray(len(ids))
        for message, (start, end) in zip(rendered.messages, rendered.spans, strict=True):
            first, last = _token_at(encoding, start), _token_at(encoding, end)
            if message.role in SPEAKERS:
                speakers[first:last] = bytes([SPEAKERS.index(message.role)]) * (last - first)
            if message.role != "assistant":
                continue
            if first == last or ids[last - 1] not in self.stop_ids:
                return RenderError("the chat template does not end an assistant message with an end-of-turn token")
            is_trained[first:last] = [bool(message.weight)] * (last - first)
        return Example(ids, is_trained, bytes(speakers))


def _stock_text(
    stock: str, conversation: Sequence[Mapping[str, str]], *, opens_turn: bool, variables: Mapping[str, str]
) -> str | None:
    """What a base's own template makes of it; None if it refuses the conversation or leaves a message out.

    Mistral's, for one, shows a system message only as long as the last question has no answer.
    """
    try:
        rendered: Any = render_jinja_template(
            [list(conversation)], chat_template=stock, add_generation_prompt=opens_turn, **_VARIABLES, **variables
        )
    except TemplateError:
        return None
    text = str(rendered[0][0])
    return text if all(message["content"].strip() in text for message in conversation) else None


def _found(text: str, content: str, position: int) -> tuple[int, int]:
    """Where a message's words lie: after those before it, unless the template puts them elsewhere."""
    start = text.find(content, position)
    start = text.find(content) if start < 0 else start
    return start, start + len(content)


def _token_at(encoding: Encoding, position: int) -> int:
    """The first token that starts at this character or later."""
    return bisect_left(range(len(encoding)), position, key=lambda token: _start_of(encoding, token))


def _start_of(encoding: Encoding, token: int) -> int:
    chars = encoding.token_to_chars(token)
    assert chars is not None, "every token is of the text: none was added"
    return chars[0]


def _require_whole(text: str) -> None:
    """JSON can write half of a surrogate pair, and no tokenizer can read it. Raises RenderError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RenderError("a text holds half of a surrogate pair; write the whole character") from None
