"""Holding rows back for validation."""

import numpy as np
import pytest

from app.core.render import Renderer
from tests.training import make
from worker.model.base import LoadedBase
from worker.training.split import NothingLeft, split
from worker.training.tokenise import TokenisedSet, tokenise

ROWS = 20


@pytest.fixture
def renderer(tiny: LoadedBase) -> Renderer:
    return tiny.renderer


@pytest.fixture
def examples(renderer: Renderer) -> TokenisedSet:
    return tokenise([*make.chats(ROWS), make.chat(99, "x" * 200, "y")], renderer, max_seq_length=make.CONTEXT)


@pytest.mark.parametrize(("part", "count"), [(0.25, 5), (0.001, 1), (7, 7), (ROWS - 1, ROWS - 1)])
def test_every_row_is_on_one_side_and_as_it_was(
    examples: TokenisedSet, renderer: Renderer, part: float | int, count: int
) -> None:
    training, validation = split(examples, part, seed=3)

    assert validation.examples == count
    assert sorted([*training.lines_E, *validation.lines_E]) == sorted(examples.lines_E)
    for half in (training, validation):
        chats = [make.chats(ROWS)[line - 2] for line in half.lines_E]
        assert half.sha256 == tokenise(chats, renderer, max_seq_length=make.CONTEXT).sha256
    assert (training.dropped_count, validation.dropped_count) == (1, 0)


def test_the_seed_decides_and_the_order_of_the_rows_does_not(examples: TokenisedSet) -> None:
    held = [split(examples, 5, seed=seed)[1].lines_E.tolist() for seed in (1, 1, 2)]
    backwards = examples.take(range(ROWS - 1, -1, -1))

    assert held[0] == held[1] != held[2]
    assert sorted(split(backwards, 5, seed=1)[1].lines_E) == held[0]


def test_something_must_be_left_to_train_on(examples: TokenisedSet) -> None:
    for part in (ROWS, 0.99):
        with pytest.raises(NothingLeft, match="20 of 20 usable rows"):
            split(examples, part, seed=1)


def test_taking_examples_keeps_tokens_marks_and_lines_together(examples: TokenisedSet) -> None:
    chosen = examples.take([4, 1])
    starts, ends = examples.offsets_E1[[4, 1]], examples.offsets_E1[[5, 2]]

    assert chosen.lines_E.tolist() == examples.lines_E[[4, 1]].tolist()
    assert chosen.lengths_E.tolist() == (ends - starts).tolist()
    assert np.array_equal(chosen.is_trained_N[: ends[0] - starts[0]], examples.is_trained_N[starts[0] : ends[0]])
