"""Messages to tokens: the one place. Training, preview and serving all come through here, so they cannot drift apart."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer

from app.core import chat_template
from app.core.chat import Message, ToolCall
from app.core.manifest import TokenVector

TOKENIZER, CARD = "tokenizer.json", "base.json"
SPEAKERS: Final = ("template", "system", "user", "assistant", "tool", "text")  # whose a token is, by number
# Llama 3.1 and 3.2 tell the date. Ours is the first's own default, for ever: tokens must not change from day to day
DATE = {"date_string": "26 Jul 2024"}

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
_TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "size_of",
            "description": "Measures.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
        },
    },
)
_TOOL_PROBE = (
    Message("user", "Wie groß?"),
    Message("assistant", "", tool_calls=(ToolCall("a1B2c3D4e", "size_of", {"what": "日本", "unit": None}),)),
    Message("tool", '{"size_cm": 12}', tool_call_id="a1B2c3D4e"),
    Message("assistant", "12 cm"),
    Message("user", "Thanks"),
    Message("assistant", "Welcome."),
)


class RenderError(ValueError):
    """This conversation cannot become training tokens with this template; the message says why."""


@dataclass(frozen=True)
class Example:
    """A rendered conversation. `is_trained[i]` says whether `tokens[i]` is to be predicted, `speakers[i]` whose it is.

    Two that are compared are one example: from `second` on it is the one that the other is preferred to. 0: there is none.
    `rating` is 1 for an answer that was called good, -1 for a bad one, 0 for one that was not rated.
    """

    tokens: list[int]
    is_trained: list[bool]
    speakers: bytes
    second: int = 0
    rating: int = 0


@dataclass(frozen=True)
class Conversation:
    """What is rendered: messages, and the tools they may call."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class _Rendered:
    """A conversation's text, and where in it each message lies: an assistant's with its end-of-turn token."""

    messages: Sequence[Message]
    text: str
    spans: list[tuple[int, int]]


def marked_template(family: str) -> str:
    """The family's chat template with `{% generation %}` around what the model says, end-of-turn token included."""
    return (files("app.core") / "templates" / f"{family}.jinja").read_text().removesuffix("\n")


def marked_tools_template(family: str) -> str | None:
    """The same for conversations with tools, if the family knows them."""
    file = files("app.core") / "templates" / f"{family}.tools.jinja"
    return file.read_text().removesuffix("\n") if file.is_file() else None


class Renderer:
    """One base's tokenizer and chat template. Thread-safe: nothing is kept between calls.

    `tools_template` writes conversations with tools; without it they are refused. All others keep to `template`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        stop_ids: Sequence[int],
        context_length: int,
        tools_template: str | None = None,
    ) -> None:
        tokenizer.no_padding()  # some bases' tokenizer.json cuts and fills up by itself
        tokenizer.no_truncation()
        self.tokenizer, self.template, self.tools_template = tokenizer, template, tools_template
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
        return cls(
            Tokenizer.from_str(tokenizer.decode()),
            facts["template"],
            facts["stop_ids"],
            facts["context_length"],
            facts.get("tools_template"),  # cards of release 0.1.0 have none
        )

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    @property
    def call_opening(self) -> str:
        """How the assistant begins to call a tool: a tag, or the bracket that a whole answer of calls begins with."""
        template = self.tools_template or ""
        if "<tool_call>" in template:
            return "<tool_call>"
        return "[" if "[TOOL_CALLS]" in template else "{"  # the former is a control token, which no decoded text shows

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids up to and with the words that open the assistant's turn. Raises RenderError."""
        text, _ = self._text(messages, tools, opens_turn=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation, with the special tokens the base wants before it. Raises RenderError."""
        _require_whole(text)
        return list(self.tokenizer.encode(text).ids)

    def example(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """Token ids and which of them are trained on: assistant turns of weight 1, each with its end-of-turn token.

        What the assistant says is its text and its calls of tools. Raises RenderError when the template hides an
        assistant turn or its end: the model would never learn to stop.
        """
        (made,) = self.examples([Conversation(messages, tools)])
        if isinstance(made, RenderError):
            raise made
        return made

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | RenderError]:
        """`example` of each, or why there is none. They are encoded side by side on all cores."""
        rendered = [self._try_render(conversation) for conversation in conversations]
        texts = [made.text for made in rendered if isinstance(made, _Rendered)]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [made if isinstance(made, RenderError) else self._example(made, next(encodings)) for made in rendered]

    def document(self, text: str, *, max_tokens: int) -> list[Example]:
        """A text that is no conversation, with its end, in as many pieces of like length as the limit asks for. All is predicted.

        Its end is the first of the base's stop tokens: the end of a text in every family here. Raises RenderError.
        """
        if found := self._special.search(text):
            raise RenderError(f"the text holds the special token {found[0]}; write it differently")
        _require_whole(text)
        before = list(self.tokenizer.encode("").ids)
        body = [*self.tokenizer.encode(text, add_special_tokens=False).ids, min(self.stop_ids)]
        count = -(-len(body) // (max_tokens - len(before)))
        ends = [len(body) * n // count for n in range(count + 1)]  # of like length: the last one alone could be a single token
        pieces = [[*before, *body[start:end]] for start, end in pairwise(ends)]
        speaker = bytes([SPEAKERS.index("text")])
        return [Example(piece, [False] + [True] * (len(piece) - 1), speaker * len(piece)) for piece in pieces]

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The text of `example`, cut where tokens to be predicted begin and end. Raises RenderError."""
        rendered = self._render(conversation)
        encoding = self.tokenizer.encode(rendered.text, add_special_tokens=False)
        example = self._example(rendered, encoding)
        if isinstance(example, RenderError):
            raise example
        flags = example.is_trained
        firsts = [i for i in range(len(flags)) if i == 0 or flags[i] != flags[i - 1]]
        starts = [_start_of(encoding, i) for i in firsts]
        ends = [*starts[1:], len(rendered.text)]
        return [(rendered.text[start:end], flags[i]) for i, start, end in zip(firsts, starts, ends, strict=True)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def longest_token(self) -> int:
        """Characters that a token stands for at most."""
        return max(map(len, self.tokenizer.get_vocab()))  # as bytes, written as one character each, or as characters

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
        probes = [_messages_of(probe) for probe in _PROBES]
        asked = [(Conversation(probe), False) for probe in probes] + [(Conversation(probe[:-1]), True) for probe in probes]
        return self._differs(asked, stock, variables)

    def differs_on_tools(self, stock: str, variables: Mapping[str, str]) -> bool:
        """Whether the base's own template writes a conversation with tools differently from ours, or not at all."""
        return self._differs([(Conversation(_TOOL_PROBE, _TOOLS), False)], stock, variables)

    def _differs(self, asked: Sequence[tuple[Conversation, bool]], stock: str, variables: Mapping[str, str]) -> bool:
        """Whether the stock template writes any of these differently, or none at all. The flag opens the assistant's turn."""
        compared = [
            self.tokenizer.encode(text, add_special_tokens=False).ids == self._ids(conversation, opens_turn=opens_turn)
            for conversation, opens_turn in asked
            if (text := _stock_text(stock, conversation, opens_turn=opens_turn, variables=variables)) is not None
        ]
        return not (compared and all(compared))

    def _ids(self, conversation: Conversation, *, opens_turn: bool) -> list[int]:
        return (
            self.prompt(conversation.messages) if opens_turn else self.example(conversation.messages, conversation.tools).tokens
        )

    def _tokens_of(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.example(_messages_of(messages)).tokens

    def _try_render(self, conversation: Conversation) -> _Rendered | RenderError:
        try:
            return self._render(conversation)
        except RenderError as error:
            return error

    def _render(self, conversation: Conversation) -> _Rendered:
        """A whole conversation. Raises RenderError."""
        messages = conversation.messages
        text, generated = self._text(messages, conversation.tools, opens_turn=False)
        if len(generated) != sum(message.role == "assistant" for message in messages):
            raise RenderError("the chat template does not show every assistant message")
        said, spans, position = iter(generated), list[tuple[int, int]](), 0
        for message in messages:
            start, end = next(said) if message.role == "assistant" else _found(text, message.content.strip(), position)
            spans.append((start, end))
            position = end
        return _Rendered(messages, text, spans)

    def _example(self, rendered: _Rendered, encoding: Encoding) -> Example | RenderError:
        ids = encoding.ids
        is_trained, speakers = [False] * len(ids), bytearray(len(ids))
        for message, (start, end) in zip(rendered.messages, rendered.spans, strict=True):
            first, last = _token_at(encoding, start), _token_at(encoding, end)
            speakers[first:last] = bytes([SPEAKERS.index(message.role)]) * (last - first)
            if message.role != "assistant":
                continue
            if first == last or ids[last - 1] not in self.stop_ids:
                return RenderError("the chat template does not end an assistant message with an end-of-turn token")
            is_trained[first:last] = [bool(message.weight)] * (last - first)
        return Example(ids, is_trained, bytes(speakers))

    def _text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, opens_turn: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans of what the assistant says. Raises RenderError.

        Special tokens in what people write would end turns and forge others; and some templates drop what they do not expect.
        """
        for what, piece in (*_pieces(messages, tools), ("a tool", json.dumps(list(tools), ensure_ascii=False))):
            if found := self._special.search(piece):
                raise RenderError(f"{what} holds the special token {found[0]}; write it differently")
        template = self.template
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            if self.tools_template is None:
                raise RenderError("the chat template of this base has no tools; choose another base, or remove them")
            template = self.tools_template
        try:
            text, spans = chat_template.render(template, _conversation(messages), tools=list(tools), opens_turn=opens_turn)
        except TemplateError as error:
            raise RenderError(f"the chat template refuses it: {error}") from None
        _require_whole(text)
        for what, piece in _pieces(messages, tools):
            if not _shows(text, piece):
                raise RenderError(f"the chat template leaves out {what}; move its text into another")
        return text, spans


def _pieces(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Everything that must be seen in a rendered text, and what to call it: templates trim."""
    for tool in tools:
        yield "the tools", tool["function"]["name"]
    for message in messages:
        yield f"a message of role {message.role}", message.content.strip()
        for call in message.tool_calls:
            yield "a tool call", call.name
            yield "a tool call", json.dumps(call.arguments, ensure_ascii=False)


def _messages_of(probe: Sequence[Mapping[str, str]]) -> list[Message]:
    return [Message(role=message["role"], content=message["content"]) for message in probe]


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates expect it; keys that say nothing are left away, since some templates ask whether they are there."""
    conversation = list[dict[str, Any]]()
    for message in messages:
        said: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            said["tool_calls"] = [
                {
                    "id": _short(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            said["tool_call_id"] = _short(message.tool_call_id)
        conversation.append(said)
    return conversation


def _short(call_id: str) -> str:
    """Mistral wants nine letters and digits; no other template shows ids."""
    return call_id if re.fullmatch(r"[A-Za-z0-9]{9}", call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _stock_text(stock: str, conversation: Conversation, *, opens_turn: bool, variables: Mapping[str, str]) -> str | None:
    """What a base's own template makes of it; None if it refuses the conversation or leaves a message out.

    Mistral's, for one, shows a system message only as long as the last question has no answer.
    """
    try:
        messages, tools = _conversation(conversation.messages), list(conversation.tools)
        text, _ = chat_template.render(stock, messages, tools=tools, opens_turn=opens_turn, **DATE, **variables)
    except TemplateError:
        return None
    return text if all(_shows(text, message.content.strip()) for message in conversation.messages) else None


def _shows(text: str, said: str) -> bool:
    """As it is, or quoted: one template quotes what tools say."""
    return said in text or _quoted(said) in text


def _quoted(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)[1:-1]


def _found(text: str, content: str, position: int) -> tuple[int, int]:
    """Where a message's words lie, perhaps quoted: after those before it, unless the template puts them elsewhere."""
    for said in (content, _quoted(content)):
        for after in (position, 0):
            if (start := text.find(said, after)) >= 0:
                return start, start + len(said)
    return position, position


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
