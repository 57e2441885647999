"""Rows that are too long: what is cut, what never is."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import catalog
from app.core.chat import Chat, Message, ToolCall
from app.core.fitting import Fitted, fit_all
from app.core.render import Renderer
from app.core.spec import LongRows
from tests.make import TINY
from worker.model import card

END = "<|im_end|>"
TOOLS = ({"type": "function", "function": {"name": "f"}},)


@pytest.fixture(scope="session")
def renderer(bases_dir: Path) -> Renderer:
    """A byte is a token."""
    return Renderer.open(card.prepared(catalog.load()[TINY], bases_dir))


def of(*said: tuple[str, str], line: int = 7) -> Chat:
    return Chat(tuple(Message(role, content) for role, content in said), line)


def fit(chat: Chat, renderer: Renderer, *, max_tokens: int, long_rows: LongRows) -> Fitted:
    return fit_all([chat], renderer, max_tokens=max_tokens, long_rows=long_rows)[0]


def cut(chat: Chat, renderer: Renderer, max_tokens: int, long_rows: LongRows = "truncate") -> tuple[Fitted, str]:
    """What came of it, and its text."""
    fitted = fit(chat, renderer, max_tokens=max_tokens, long_rows=long_rows)
    tokens = fitted.example.tokens if fitted.example else []
    assert len(tokens) <= max_tokens
    return fitted, renderer.tokenizer.decode(tokens, skip_special_tokens=False)


def test_a_pair_is_one_example_of_two_conversations_whose_answers_alone_are_trained(renderer: Renderer) -> None:
    asked = (Message("user", "one?"), Message("assistant", "1", 0), Message("user", "two?"))
    pair = Chat((*asked, Message("assistant", "yes")), 7, rejected=Message("assistant", "no!!!"))
    sides = [renderer.example(side) for side in pair.sides]
    fitted = fit(pair, renderer, max_tokens=200, long_rows="drop")

    assert fitted.example is not None and fitted.problem is None
    assert fitted.example.tokens == sides[0].tokens + sides[1].tokens
    assert fitted.example.second == len(sides[0].tokens)
    assert fitted.length == len(sides[1].tokens)
    trained = [token for token, flag in zip(fitted.example.tokens, fitted.example.is_trained, strict=True) if flag]
    assert renderer.tokenizer.decode(trained, skip_special_tokens=False) == f"yes{END}no!!!{END}"


@pytest.mark.parametrize("most", [8, 30, 31, 1000])
def test_a_text_is_learnt_whole_in_pieces_that_fit(renderer: Renderer, most: int) -> None:
    text = "Ünd so weiter, " * 4
    pieces = fit_all([Chat((), 7, text=text)], renderer, max_tokens=most, long_rows="drop")
    made = [piece.example for piece in pieces if piece.example]

    assert len(made) == len(pieces) and max(len(example.tokens) for example in made) <= most
    assert (
        renderer.tokenizer.decode([t for example in made for t in example.tokens], skip_special_tokens=False)
        == f"{text}<|endoftext|>"
    )
    assert all(example.is_trained == [False] + [True] * (len(example.tokens) - 1) and any(example.is_trained) for example in made)
    assert [piece.is_further for piece in pieces] == [n > 0 for n in range(len(pieces))]
    assert [piece.length for piece in pieces] == [len(text.encode()) + 1] + [0] * (len(pieces) - 1)


def test_a_text_with_a_special_token_is_left_out(renderer: Renderer) -> None:
    (fitted,) = fit_all([Chat((), 7, text=f"one{END}two")], renderer, max_tokens=100, long_rows="drop")

    assert fitted.example is None and fitted.problem is not None and fitted.problem.code == "row_not_rendered"


def test_a_pair_goes_whole_when_one_side_is_too_long_or_cannot_be_shown(renderer: Renderer) -> None:
    pair = Chat((Message("user", "two?"), Message("assistant", "yes")), 7, rejected=Message("assistant", "no" * 50))
    longer = len(renderer.example(pair.sides[1]).tokens)
    fitted = [fit(pair, renderer, max_tokens=most, long_rows="truncate") for most in (longer - 1, longer)]
    forged = fit(replace(pair, rejected=Message("assistant", END)), renderer, max_tokens=longer, long_rows="drop")

    assert [made.example is None for made in fitted] == [True, False]
    assert (
        fitted[0].problem is not None
        and fitted[0].problem.code == "row_too_long"
        and "no side is cut" in fitted[0].problem.message
    )
    assert forged.problem is not None and forged.problem.code == "row_not_rendered"


def length_of(chat: Chat, renderer: Renderer) -> int:
    return len(renderer.example(chat.messages, chat.tools).tokens)


LONG = of(
    ("system", "Be brief."),
    ("user", "one?" * 9),
    ("assistant", "1"),
    ("user", "two?" * 9),
    ("assistant", "2"),
    ("user", "three?"),
    ("assistant", "3"),
    ("user", "Thanks"),
)


def test_a_row_that_fits_is_as_it_is(renderer: Renderer) -> None:
    fitted, _ = cut(LONG, renderer, length_of(LONG, renderer))

    assert fitted.problem is None
    assert fitted.example == renderer.example(LONG.messages)


def test_by_default_a_long_row_is_left_out_and_named(renderer: Renderer) -> None:
    fitted, _ = cut(LONG, renderer, length_of(LONG, renderer) - 1, "drop")

    assert fitted.example is None
    assert fitted.problem is not None
    assert (fitted.problem.code, fitted.problem.line) == ("row_too_long", 7)


def test_the_oldest_turns_go_and_the_system_message_stays(renderer: Renderer) -> None:
    end = of(("system", "Be brief."), *((m.role, m.content) for m in LONG.messages[3:7]))
    fitted, text = cut(LONG, renderer, length_of(end, renderer))

    assert fitted.example == renderer.example(end.messages)
    assert text.startswith("<|im_start|>system\nBe brief.")
    assert fitted.problem is not None and fitted.problem.code == "row_truncated"
    assert "3 of its 8 messages are left out" in fitted.problem.message


def test_a_question_alone_loses_its_first_tokens(renderer: Renderer) -> None:
    chat = of(("user", "abcdefghij" * 3), ("assistant", "the answer"))
    fitted, text = cut(chat, renderer, length_of(chat, renderer) - 25)

    assert text == f"<|im_start|>user\nfghij{END}\n<|im_start|>assistant\nthe answer{END}\n"
    assert fitted.problem is not None and "25 tokens" in fitted.problem.message


def test_an_answer_that_fills_the_limit_is_left_out_not_cut(renderer: Renderer) -> None:
    chat = of(("user", "abc"), ("assistant", "the answer" * 9))
    fitted, _ = cut(chat, renderer, length_of(chat, renderer) - 3)

    assert fitted.example is None
    assert fitted.problem is not None and fitted.problem.code == "row_too_long"
    assert "no room for its question" in fitted.problem.message


def test_what_follows_the_last_trained_answer_is_cut_too(renderer: Renderer) -> None:
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c" * 50), Message("assistant", "d", 0))
    _, text = cut(Chat(messages, 1), renderer, 60)

    assert text == f"<|im_start|>user\na{END}\n<|im_start|>assistant\nb{END}\n"


def test_a_row_without_trained_answer_has_none_to_keep(renderer: Renderer) -> None:
    fitted, _ = cut(Chat((Message("user", "a" * 90), Message("assistant", "b", 0)), 1), renderer, 40)

    assert fitted.problem is not None and fitted.problem.code == "row_too_long"


def test_calls_and_their_results_stay_with_their_question(renderer: Renderer) -> None:
    asked = (
        Message("user", "now?"),
        Message("assistant", "", tool_calls=(ToolCall("1", "f", {}),)),
        Message("tool", "12", tool_call_id="1"),
        Message("assistant", "noon"),
    )
    whole = Chat((Message("user", "x" * 99), Message("assistant", "y"), *asked), 1, TOOLS)
    fitted, text = cut(whole, renderer, length_of(Chat(asked, 1, TOOLS), renderer))

    assert fitted.example == renderer.example(asked, TOOLS)
    assert "# Tools" in text and "xxx" not in text


turns = st.lists(st.tuples(st.text("ab ü🙂", max_size=30), st.text("xy", min_size=1, max_size=12)), min_size=1, max_size=5)


@given(turns=turns, max_tokens=st.integers(20, 200), system=st.none() | st.text("s", max_size=9))
def test_whatever_the_limit_the_last_answer_is_whole_or_the_row_is_out(
    renderer: Renderer, turns: list[tuple[str, str]], max_tokens: int, system: str | None
) -> None:
    opening = [] if system is None else [("system", system)]
    chat = of(*opening, *(said for asked, answer in turns for said in (("user", asked), ("assistant", answer))))
    fitted, text = cut(chat, renderer, max_tokens)

    if fitted.example is None:
        assert fitted.problem is not None
        return
    assert text.endswith(f"<|im_start|>assistant\n{turns[-1][1]}{END}\n")
    assert text.count("<|im_start|>") == text.count(f"{END}\n")
    assert text.startswith("<|im_start|>system\n" if system is not None else "<|im_start|>user\n")
    trained = [token for token, flag in zip(fitted.example.tokens, fitted.example.is_trained, strict=True) if flag]
    assert renderer.tokenizer.decode(trained, skip_special_tokens=False).endswith(turns[-1][1] + END)


def test_a_character_is_never_cut_in_two(renderer: Renderer) -> None:
    chat = of(("user", "🙂" * 10), ("assistant", "yes"))
    for less in range(1, 36):
        _, text = cut(chat, renderer, length_of(chat, renderer) - less)
        assert "\ufffd" not in text
