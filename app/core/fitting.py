"""A conversation for training, within a limit of tokens: as it is, without its beginning, or not at all."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from app.core.chat import Chat, Message
from app.core.data import Problem
from app.core.render import Example, Renderer, RenderError
from app.core.spec import LongRows


@dataclass(frozen=True)
class Fitted:
    """What is trained on of a row, if anything is, and what its owner must be told of it, if something is."""

    example: Example | None
    problem: Problem | None = None


def fit(chat: Chat, renderer: Renderer, *, max_tokens: int, long_rows: LongRows) -> Fitted:
    """Render a row. One that is too long is left out, or, with `truncate`, loses its beginning and never its last answer:

    whole turns first, from the oldest, system messages kept; then the beginning of the question before that answer.
    """
    try:
        whole = renderer.example(chat.messages, chat.tools)
        if len(whole.tokens) <= max_tokens:
            return _trained(whole, chat)
        too_long = f"the row has {len(whole.tokens)} tokens; at most {max_tokens} are trained on"
        cut = _cut(chat, renderer, max_tokens) if long_rows == "truncate" else None
    except RenderError as error:
        return Fitted(None, Problem(line=chat.line, code="row_not_rendered", message=str(error)))
    if cut is None:
        hint = ", and its last answer leaves no room for its question" if long_rows == "truncate" else ""
        return Fitted(None, Problem(line=chat.line, code="row_too_long", message=too_long + hint))
    example, what = cut
    fitted = _trained(example, chat)
    return (
        fitted
        if fitted.problem
        else replace(fitted, problem=Problem(line=chat.line, code="row_truncated", message=f"{too_long}: {what}"))
    )


def _trained(example: Example, chat: Chat) -> Fitted:
    example.is_trained[0] = False  # nothing stands before it to predict it from
    if any(example.is_trained):
        return Fitted(example)
    return Fitted(None, Problem(line=chat.line, code="nothing_to_train", message="no token of the row is to be predicted"))


def _cut(chat: Chat, renderer: Renderer, max_tokens: int) -> tuple[Example, str] | None:
    """The longest end that fits, and what it lacks. Raises RenderError."""
    answers = [index for index, message in enumerate(chat.messages) if message.role == "assistant" and message.weight]
    if not answers:
        return None
    kept = chat.messages[: answers[-1] + 1]  # nothing after it is trained on
    first_turn = next(index for index, message in enumerate(kept) if message.role != "system")
    head, questions = kept[:first_turn], [index for index in range(first_turn, len(kept)) if kept[index].role == "user"]

    def beginning_at(index: int) -> Example:
        return renderer.example((*head, *kept[index:]), chat.tools)

    found = bisect_left(questions, True, key=lambda index: len(beginning_at(index).tokens) <= max_tokens)
    if found < len(questions):
        left_out = len(chat.messages) - len(head) - (len(kept) - questions[found])
        return beginning_at(questions[found]), f"{left_out} of its {len(chat.messages)} messages are left out"
    if not questions:
        return None
    return _with_shorter_question((*head, *kept[questions[-1] :]), len(head), chat, renderer, max_tokens)


def _with_shorter_question(
    messages: tuple[Message, ...], question: int, chat: Chat, renderer: Renderer, max_tokens: int
) -> tuple[Example, str] | None:
    """The question loses its first tokens, as many as are too many. The rest may make other tokens: they are counted again."""
    text = messages[question].content
    offsets = renderer.tokenizer.encode(text, add_special_tokens=False).offsets
    lost = len(renderer.example(messages, chat.tools).tokens) - max_tokens
    while lost < len(offsets):
        shorter = replace(messages[question], content=text[offsets[lost][0] :])
        example = renderer.example((*messages[:question], shorter, *messages[question + 1 :]), chat.tools)
        if (excess := len(example.tokens) - max_tokens) <= 0:
            return example, f"all before its last question, and {lost} tokens of that, are left out"
        lost += excess
    return None
