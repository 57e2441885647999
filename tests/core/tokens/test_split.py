"""Holding rows back for validation."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from app.core.chat import Chat
from app.core.render import Renderer
from app.core.tokens.split import NothingLeft, split
from app.core.tokens.token_file import TokenReader
from app.core.tokens.tokenise import TokenisedSet, tokenise, tokenise_to
from tests.training import make

ROWS = 20
Halves = Callable[..., tuple[TokenisedSet, TokenisedSet]]


@pytest.fixture
def renderer(tiny: Renderer) -> Renderer:
    return tiny


@pytest.fixture
def halves(renderer: Renderer, tmp_path: Path) -> Halves:
    """What the rows become when they are split: kept, and held back."""

    def split_rows(part: float | int, *, seed: int, rows: Iterable[Chat] = make.chats(ROWS)) -> tuple[TokenisedSet, TokenisedSet]:
        whole, kept, held_back = (tmp_path / name for name in ("whole", "kept", "held_back"))
        chats = [*rows, make.chat(99, "x" * 200, "y")]
        tokenise_to(whole, chats, renderer, max_seq_length=make.CONTEXT, long_rows="drop")
        with TokenReader(whole) as examples:
            report = split(examples, part, seed=seed, kept=kept, held_back=held_back)
        read = TokenisedSet.read(kept), TokenisedSet.read(held_back)
        for said, half in zip((report.kept, report.held_back), read, strict=True):
            assert (said.examples, said.tokens, said.longest) == (half.examples, half.tokens, half.longest)
            assert said.trained_tokens == half.labelled_tokens
        return read

    return split_rows


@pytest.mark.parametrize(("part", "count"), [(0.25, 5), (0.001, 1), (7, 7), (ROWS - 1, ROWS - 1)])
def test_every_row_is_on_one_side_and_as_it_was(halves: Halves, renderer: Renderer, part: float | int, count: int) -> None:
    training, validation = halves(part, seed=3)

    assert validation.examples == count
    assert sorted([*training.lines_E, *validation.lines_E]) == [chat.line for chat in make.chats(ROWS)]
    for half in (training, validation):
        chats = [make.chats(ROWS)[line - 2] for line in half.lines_E]
        assert half.sha256 == tokenise(chats, renderer, max_seq_length=make.CONTEXT).sha256


def test_the_seed_decides_and_the_order_of_the_rows_does_not(halves: Halves) -> None:
    held = [halves(5, seed=seed)[1].lines_E.tolist() for seed in (1, 1, 2)]
    backwards = halves(5, seed=1, rows=reversed(make.chats(ROWS)))[1].lines_E

    assert held[0] == held[1] != held[2]
    assert sorted(backwards) == held[0]


def test_equal_rows_stay_together(halves: Halves) -> None:
    """But for those at the cut."""
    twice = [row for chat in make.chats(ROWS) for row in (chat, chat)]
    training, validation = halves(10, seed=1, rows=twice)

    assert len(set(training.lines_E) & set(validation.lines_E)) == 0


def test_something_must_be_left_to_train_on(halves: Halves) -> None:
    for part in (ROWS, 0.99):
        with pytest.raises(NothingLeft, match="20 of 20 usable rows"):
            halves(part, seed=1)
