"""Chats to what is trained on: rendered, no longer than asked for, with something to learn in them; or the reason why not."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.core.chat import Chat, Message, Problem
from app.core.render import Example, Renderer, RenderError
from app.core.spec import LongRows

_TRIES = 8  # to shorten a message: its tokens alone are nearly those it has among the others


@dataclass(frozen=True)
class Limits:
    """The longest example, in tokens, and what becomes of rows that are longer."""

    max_seq_length: int
    long_rows: LongRows = "drop"


@dataclass(frozen=True)
class Row:
    """What became of a chat. `length` is its tokens before anything was cut; 0 when it cannot be rendered."""

    chat: Chat
    length: int = 0
    example: Example | None = None
    problem: Problem | None = None
    is_cut: bool = False


def fit(chats: Sequence[Chat], renderer: Renderer, limits: Limits) -> list[Row]:
    """One row for each chat: with an example, or with a problem. Encodes them side by side: hand in a few hundred at a time.

    A row is left out, or cut where nothing is learned: in what stands before its first answer, from the left. An answer is never
    cut: it would be lost, or teach a model that answers have no end.
    """
    made = renderer.examples([chat.messages for chat in chats])
    return [_row(chat, example, renderer, limits) for chat, example in zip(chats, made, strict=True)]


def _row(chat: Chat, made: Example | RenderError, renderer: Renderer, limits: Limits) -> Row:
    if isinstance(made, RenderError):
        return Row(chat, problem=Problem(line=chat.line, code="row_not_rendered", message=str(made)))
    length, most, is_cut = len(made.tokens), limits.max_seq_length, False
    if length > most:
        cut = _cut(chat, renderer, most) if limits.long_rows == "truncate" else None
        if cut is None:
            advice = "" if limits.long_rows == "drop" else ", and what stands before its first answer cannot be cut enough"
            message = f"the row has {length} tokens; at most {most} are trained on{advice}"
            return Row(chat, length, problem=Problem(line=chat.line, code="row_too_long", message=message))
        chat, made, is_cut = cut, renderer.example(cut.messages), True
    made.is_trained[0] = False  # nothing stands before it to predict it from
    if not any(made.is_trained):
        message = "no token of the row is to be predicted; give an assistant message weight 1"
        return Row(chat, length, problem=Problem(line=chat.line, code="nothing_to_train", message=message))
    return Row(chat, length, made, is_cut=is_cut)


def _cut(chat: Chat, renderer: Renderer, most: int) -> Chat | None:
    """Without its oldest questions and answers, of which none is trained on; if that is not enough, without the beginning of
    the last question. What a system message says stays. None when the row is too long all the same."""
    messages = chat.messages
    answer = next((i for i, message in enumerate(messages) if message.role == "assistant" and message.weight), 0)
    opening = next(i for i, message in enumerate(messages) if message.role != "system")
    starts = [i for i in range(opening, answer) if messages[i].role == "user"]
    if not starts:
        return None

    def fits(start: int) -> bool:
        return _length(renderer, (*messages[:opening], *messages[start:])) <= most

    try:
        if (first := bisect_left(starts, True, key=fits)) < len(starts):
            return replace(chat, messages=(*messages[:opening], *messages[starts[first] :]))
        return _shortened(chat, renderer, most, before=messages[:opening], at=starts[-1])
    except RenderError:  # a template may not take what is left
        return None


def _shortened(chat: Chat, renderer: Renderer, most: int, *, before: tuple[Message, ...], at: int) -> Chat | None:
    """The chat from message `at` on, of which as many tokens as needed are left out at its beginning."""
    question, rest = chat.messages[at], chat.messages[at + 1 :]
    encoding = renderer.tokenizer.encode(question.content, add_special_tokens=False)
    excess = _length(renderer, (*before, question, *rest)) - most
    for _ in range(_TRIES):
        if excess >= len(encoding):
            return None
        left = replace(question, content=question.content[encoding.offsets[excess][0] :])
        over = _length(renderer, (*before, left, *rest)) - most
        if over <= 0:
            return replace(chat, messages=(*before, left, *rest))
        excess += over
    return None


def _length(renderer: Renderer, messages: Sequence[Message]) -> int:
    return len(renderer.example(messages).tokens)
