"""A row for training, within a limit of tokens: as it is, without its beginning, or not at all."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.core.chat import Chat
from app.core.data import Problem
from app.core.render import Conversation, Example, Renderer, RenderError
from app.core.spec import LongRows


@dataclass(frozen=True)
class Fitted:
    """What is trained on of a row, if anything is, and what its owner must be told of it, if something is.

    `chat` is what is left of the row, `length` its tokens before anything was cut, of two sides those of the longer one; 0 when
    it cannot be rendered. Of a text in pieces the first has the length of all, and those after it are `is_further`.
    """

    chat: Chat
    example: Example | None
    problem: Problem | None = None
    length: int = 0
    is_further: bool = False


def fit_all(chats: Sequence[Chat], renderer: Renderer, *, max_tokens: int, long_rows: LongRows) -> list[Fitted]:
    """Render rows. One that is too long is left out, or, with `truncate`, loses its beginning and never its last answer:

    whole turns first, from the oldest, system messages kept; then the beginning of the question before that answer. A row that
    compares two answers is never cut: both would have to lose the same. A long text becomes several, and loses nothing.
    Conversations are encoded side by side on all cores.
    """
    made = iter(renderer.examples([Conversation(side, chat.tools) for chat in chats if chat.text is None for side in chat.sides]))
    fitted = list[Fitted]()
    for chat in chats:
        if chat.text is not None:
            fitted += _pieces(chat, chat.text, renderer, max_tokens)
        elif chat.rejected is not None:
            fitted.append(_paired(chat, [next(made), next(made)], max_tokens=max_tokens))
        else:
            fitted.append(_fitted(chat, next(made), renderer, max_tokens=max_tokens, long_rows=long_rows))
    return fitted


def _pieces(chat: Chat, text: str, renderer: Renderer, max_tokens: int) -> list[Fitted]:
    try:
        pieces = renderer.document(text, max_tokens=max_tokens)
    except RenderError as error:
        return [_not_rendered(chat, error)]
    length = sum(len(piece.tokens) for piece in pieces)
    return [Fitted(chat, piece, length=0 if n else length, is_further=n > 0) for n, piece in enumerate(pieces)]


def _paired(chat: Chat, rendered: Sequence[Example | RenderError], *, max_tokens: int) -> Fitted:
    """Both sides as one example, or neither."""
    sides = list[Example]()
    for side in rendered:
        if isinstance(side, RenderError):
            return _not_rendered(chat, side)
        sides.append(side)
    length = max(len(side.tokens) for side in sides)
    if length > max_tokens:
        message = f"the longer side of the row has {length} tokens; at most {max_tokens} are trained on, and no side is cut"
        return Fitted(chat, None, Problem(line=chat.line, code="row_too_long", message=message), length)
    preferred, rejected = sides
    pair = Example(
        preferred.tokens + rejected.tokens,
        preferred.is_trained + rejected.is_trained,
        preferred.speakers + rejected.speakers,
        second=len(preferred.tokens),
    )
    return Fitted(chat, pair, length=length)


def _fitted(chat: Chat, whole: Example | RenderError, renderer: Renderer, *, max_tokens: int, long_rows: LongRows) -> Fitted:
    if isinstance(whole, RenderError):
        return _not_rendered(chat, whole)
    length = len(whole.tokens)
    if length <= max_tokens:
        return _trained(whole, chat, length)
    too_long = f"the row has {length} tokens; at most {max_tokens} are trained on"
    try:
        cut = _cut(chat, renderer, max_tokens) if long_rows == "truncate" else None
    except RenderError as error:
        return _not_rendered(chat, error)
    if cut is None:
        hint = ", and its last answer leaves no room for its question" if long_rows == "truncate" else ""
        return Fitted(chat, None, Problem(line=chat.line, code="row_too_long", message=too_long + hint), length)
    rest, example, what = cut
    fitted = _trained(example, rest, length)
    if fitted.problem:
        return fitted
    return replace(fitted, problem=Problem(line=chat.line, code="row_truncated", message=f"{too_long}: {what}"))


def _not_rendered(chat: Chat, error: RenderError) -> Fitted:
    return Fitted(chat, None, Problem(line=chat.line, code="row_not_rendered", message=str(error)))


def _trained(example: Example, chat: Chat, length: int) -> Fitted:
    example.is_trained[0] = False  # nothing stands before it to predict it from
    if any(example.is_trained):
        rating = 0 if chat.is_good is None else 1 if chat.is_good else -1
        return Fitted(chat, replace(example, rating=rating), length=length)
    problem = Problem(line=chat.line, code="nothing_to_train", message="no token of the row is to be predicted")
    return Fitted(chat, None, problem, length)


def _cut(chat: Chat, renderer: Renderer, max_tokens: int) -> tuple[Chat, Example, str] | None:
    """The longest end that fits, and what it lacks. Raises RenderError."""
    answers = [index for index, message in enumerate(chat.messages) if message.role == "assistant" and message.weight]
    if not answers:
        return None
    kept = chat.messages[: answers[-1] + 1]  # nothing after it is trained on
    first_turn = next(index for index, message in enumerate(kept) if message.role != "system")
    head, questions = kept[:first_turn], [index for index in range(first_turn, len(kept)) if kept[index].role == "user"]

    def beginning_at(index: int) -> Chat:
        return replace(chat, messages=(*head, *kept[index:]))

    found = bisect_left(questions, True, key=lambda index: len(_example(beginning_at(index), renderer).tokens) <= max_tokens)
    if found < len(questions):
        left_out = len(chat.messages) - len(head) - (len(kept) - questions[found])
        rest = beginning_at(questions[found])
        return rest, _example(rest, renderer), f"{left_out} of its {len(chat.messages)} messages are left out"
    if not questions:
        return None
    return _with_shorter_question(beginning_at(questions[-1]), len(head), renderer, max_tokens)


def _with_shorter_question(chat: Chat, question: int, renderer: Renderer, max_tokens: int) -> tuple[Chat, Example, str] | None:
    """The question loses its first tokens, as many as are too many. The rest may make other tokens: they are counted again."""
    messages, text = chat.messages, chat.messages[question].content
    offsets = renderer.tokenizer.encode(text, add_special_tokens=False).offsets
    lost = len(_example(chat, renderer).tokens) - max_tokens
    while lost < len(offsets):
        shorter = replace(messages[question], content=text[offsets[lost][0] :])
        rest = replace(chat, messages=(*messages[:question], shorter, *messages[question + 1 :]))
        example = _example(rest, renderer)
        if (excess := len(example.tokens) - max_tokens) <= 0:
            return rest, example, f"all before its last question, and {lost} tokens of that, are left out"
        lost += excess
    return None


def _example(chat: Chat, renderer: Renderer) -> Example:
    return renderer.example(chat.messages, chat.tools)
