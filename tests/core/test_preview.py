"""What the API shows of the first rows is what will be trained on."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core import catalog
from app.core.chat import Chat, Message
from app.core.preview import ROWS, RowPreview
from app.core.preview import preview as previewed
from app.core.render import Renderer
from app.core.spec import LongRows
from app.core.tokens.tokenise import tokenise
from worker.model import card

ROW = Chat((Message("user", "Hi"), Message("assistant", "no", 0), Message("user", "b"), Message("assistant", "Yes 🙂")), 3)
LONG = Chat((Message("user", "x" * 400), Message("assistant", "Yes")), 4)


def test_a_preview_of_a_pair_shows_both_sides(tiny: Renderer) -> None:
    pair = Chat((Message("user", "b"), Message("assistant", "Yes")), 3, rejected=Message("assistant", "No"))
    (shown,) = preview([pair], tiny, 256)

    for pieces, answer in ((shown.pieces, "Yes"), (shown.rejected_pieces, "No")):
        assert [piece.text for piece in pieces if piece.trained] == [f"{answer}<|im_end|>"]
        assert "".join(piece.text for piece in pieces if not piece.trained).count("user\nb") == 1
    both = "".join(piece.text for piece in (*shown.pieces, *shown.rejected_pieces))
    assert both == tiny.tokenizer.decode(list(shown.tokens), skip_special_tokens=False)


def test_a_preview_tells_how_a_row_was_rated(tiny: Renderer) -> None:
    rated = [replace(ROW, is_good=is_good) for is_good in (True, False, None)]

    assert [shown.label for shown in preview(rated, tiny, 256)] == [True, False, None]


@pytest.fixture(scope="module")
def tiny(bases_dir: Path) -> Renderer:
    return Renderer.open(card.prepared(catalog.load()["tiny-random-llama"], bases_dir))


def preview(chats: Iterable[Chat], tiny: Renderer, most: int, long_rows: LongRows = "drop") -> list[RowPreview]:
    return previewed(chats, tiny, max_seq_length=most, long_rows=long_rows)


def test_a_preview_shows_the_tokens_that_are_trained_on(tiny: Renderer) -> None:
    (shown,) = preview([ROW], tiny, 256)
    made = tokenise([ROW], tiny, max_seq_length=256)

    assert list(shown.tokens) == made.tokens_N.tolist()
    assert shown.trained_tokens == made.labelled_tokens
    assert [piece.text for piece in shown.pieces if piece.trained] == ["Yes 🙂<|im_end|>"]
    assert "".join(piece.text for piece in shown.pieces) == tiny.tokenizer.decode(list(shown.tokens), skip_special_tokens=False)
    assert (shown.line, shown.length, shown.problem) == (3, len(shown.tokens), None)


def test_a_row_that_will_be_left_out_says_why(tiny: Renderer) -> None:
    (shown,) = preview([LONG], tiny, 64)

    assert shown.problem is not None and shown.problem.code == "row_too_long"
    assert (shown.tokens, shown.pieces) == ((), ())
    assert shown.length > 400


def test_a_row_that_will_be_cut_is_shown_cut(tiny: Renderer) -> None:
    (shown,) = preview([LONG], tiny, 64, "truncate")

    assert shown.problem is not None and shown.problem.code == "row_truncated"
    assert len(shown.tokens) <= 64 < shown.length
    assert shown.pieces[-2].text == "Yes<|im_end|>"


def test_only_the_first_rows_are_read(tiny: Renderer) -> None:
    rows = (ROW for _ in range(1000))

    assert len(preview(rows, tiny, 256)) == ROWS
    assert sum(1 for _ in rows) == 1000 - ROWS
