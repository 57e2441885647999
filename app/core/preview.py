"""The first rows as they will be trained on, for people to look at: a wrong template is seen before it is trained."""

from collections.abc import Iterable
from itertools import islice

from pydantic import BaseModel, ConfigDict

from app.core.chat import Chat, Problem
from app.core.fit import Limits, Row, fit
from app.core.render import Renderer

ROWS = 5


class Piece(BaseModel):
    """Text whose tokens are all to be predicted, or none of them."""

    model_config = ConfigDict(frozen=True)

    text: str
    trained: bool


class RowPreview(BaseModel):
    """One row: its tokens, and its text in pieces. A row that will be left out has a `problem` and no tokens.

    `length` is its tokens before anything was cut; `is_cut` says that something was.
    """

    model_config = ConfigDict(frozen=True)

    line: int
    length: int
    is_cut: bool
    trained_tokens: int
    tokens: tuple[int, ...]
    pieces: tuple[Piece, ...]
    problem: Problem | None


def preview(chats: Iterable[Chat], renderer: Renderer, limits: Limits, *, rows: int = ROWS) -> list[RowPreview]:
    """The first `rows` of the chats, rendered and tokenised exactly as for training. Needs neither weights nor torch."""
    return [_shown(row, renderer) for row in fit(list(islice(chats, rows)), renderer, limits)]


def _shown(row: Row, renderer: Renderer) -> RowPreview:
    example = row.example
    pieces = renderer.pieces(row.chat.messages) if example else []
    return RowPreview(
        line=row.chat.line,
        length=row.length,
        is_cut=row.is_cut,
        trained_tokens=sum(example.is_trained) if example else 0,
        tokens=tuple(example.tokens) if example else (),
        pieces=tuple(Piece(text=text, trained=is_trained) for text, is_trained in pieces),
        problem=row.problem,
    )
