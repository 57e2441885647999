"""Rows that are too long: left out, or cut where nothing is learned, and never in an answer."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.core import catalog
from app.core.chat import Chat, Message
from app.core.fit import Limits, Row, fit
from app.core.render import Renderer
from worker.model import card

SYSTEM = Message("system", "Be brief.")
OLD = (Message("user", "old " * 10), Message("assistant", "old answer", 0))
LAST = (Message("user", "".join(str(n % 10) for n in range(80))), Message("assistant", "The answer."))


@pytest.fixture(scope="module")
def tiny(bases_dir: Path) -> Renderer:
    return Renderer.open(card.prepared(catalog.load()["tiny-random-llama"], bases_dir))


def cut(renderer: Renderer, *messages: Message, limit: int) -> Row:
    (row,) = fit([Chat(messages, 1)], renderer, Limits(limit, "truncate"))
    return row


def length(renderer: Renderer, *messages: Message) -> int:
    return len(renderer.example(messages).tokens)


def test_the_oldest_turns_go_first_and_whole(tiny: Renderer) -> None:
    kept = (SYSTEM, *OLD, *LAST)
    row = cut(tiny, SYSTEM, *OLD, *OLD, *LAST, limit=length(tiny, *kept))

    assert row.is_cut
    assert row.chat.messages == kept


def test_then_the_question_loses_its_beginning_and_the_answer_nothing(tiny: Renderer) -> None:
    limit = length(tiny, SYSTEM, *LAST) - 30
    row = cut(tiny, SYSTEM, *OLD, *LAST, limit=limit)

    assert row.chat.messages == (SYSTEM, replace(LAST[0], content=LAST[0].content[30:]), LAST[1])
    assert row.example is not None and len(row.example.tokens) == limit


@pytest.mark.parametrize("messages", [(Message("user", "?"), Message("assistant", "a" * 90)), (*LAST, *LAST)])
def test_answers_that_do_not_fit_are_left_out_whole(tiny: Renderer, messages: tuple[Message, ...]) -> None:
    row = cut(tiny, *messages, limit=80)

    assert row.example is None
    assert row.problem is not None and row.problem.code == "row_too_long"


def test_what_fits_is_not_touched(tiny: Renderer) -> None:
    row = cut(tiny, SYSTEM, *OLD, *LAST, limit=length(tiny, SYSTEM, *OLD, *LAST))

    assert not row.is_cut
    assert row.chat.messages == (SYSTEM, *OLD, *LAST)


def test_characters_of_several_tokens_are_not_torn(tiny: Renderer) -> None:
    question = Message("user", "日本語" * 20)
    row = cut(tiny, question, LAST[1], limit=length(tiny, question, LAST[1]) - 31)

    assert row.example is not None and "\ufffd" not in tiny.decode(row.example.tokens)
