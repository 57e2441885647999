"""The first rows as they will be trained on, for people to look at: a wrong template is seen before it is trained."""

from collections.abc import Iterable
from itertools import islice

from pydantic import BaseModel, ConfigDict

from app.core.chat import Chat
from app.core.data import Problem
from app.core.fitting import Fitted, fit_all
from app.core.render import Conversation, Renderer
from app.core.spec import LongRows

ROWS = 5


class Piece(BaseModel):
    """Text whose tokens are all to be predicted, or none of them."""

    model_config = ConfigDict(frozen=True)

    text: str
    trained: bool


class RowPreview(BaseModel):
    """One row: its tokens, and its text in pieces. A row that will be left out has none; `problem` says why.

    A row that compares two answers is two conversations: `rejected_pieces` are those of the second, and its tokens come last.
    `label` is that of a row whose answer was rated.

    `length` is its tokens before anything was cut; the problem of a row that was is `row_truncated`.
    """

    model_config = ConfigDict(frozen=True)

    line: int
    length: int
    trained_tokens: int
    tokens: tuple[int, ...]
    pieces: tuple[Piece, ...]
    rejected_pieces: tuple[Piece, ...] = ()
    label: bool | None = None
    problem: Problem | None


def preview(
    chats: Iterable[Chat], renderer: Renderer, *, max_seq_length: int, long_rows: LongRows, rows: int = ROWS
) -> list[RowPreview]:
    """The first `rows` of the chats, rendered and tokenised exactly as for training. Needs neither weights nor torch."""
    fitted = fit_all(list(islice(chats, rows)), renderer, max_tokens=max_seq_length, long_rows=long_rows)
    return [_shown(row, renderer) for row in fitted[:rows]]  # a long text is several


def _shown(row: Fitted, renderer: Renderer) -> RowPreview:
    example, chat = row.example, row.chat
    sides: list[tuple[Piece, ...]] = [()]
    if example and chat.text is not None:
        sides = [(Piece(text=renderer.decode(example.tokens), trained=True),)]
    elif example:
        sides = [_pieces(Conversation(side, chat.tools), renderer) for side in chat.sides]
    return RowPreview(
        line=chat.line,
        length=row.length,
        trained_tokens=sum(example.is_trained) if example else 0,
        tokens=tuple(example.tokens) if example else (),
        pieces=sides[0],
        rejected_pieces=sides[1] if sides[1:] else (),
        label=chat.is_good,
        problem=row.problem,
    )


def _pieces(conversation: Conversation, renderer: Renderer) -> tuple[Piece, ...]:
    return tuple(Piece(text=text, trained=is_trained) for text, is_trained in renderer.pieces(conversation))
