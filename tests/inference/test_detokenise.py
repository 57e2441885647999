"""Text comes out piece by piece, never broken, and never a piece of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from worker.inference.detokenise import Detokeniser, StopStrings
from worker.model.base import LoadedBase


@pytest.fixture(scope="module")
def tokenizer(oracle: LoadedBase) -> Tokenizer:
    """One token a byte: every character that is not ASCII comes in pieces."""
    return oracle.renderer.tokenizer


@given(text=st.text(alphabet=st.sampled_from("ab é日🙂\n\u200d"), max_size=12))
def test_characters_come_whole_and_nothing_is_lost(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokeniser(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]

    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


@given(tokens=st.lists(st.integers(0, 255), max_size=24))
def test_bytes_that_are_no_text_come_out_as_decoding_them_at_once_would_show_them(
    tokenizer: Tokenizer, tokens: list[int]
) -> None:
    stream = Detokeniser(tokenizer)
    told = "".join(stream.push(token) for token in tokens) + stream.flush()

    assert told == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    stream = Detokeniser(tokenizer)

    assert [stream.push(token) for token in tokenizer.encode("🙂!", add_special_tokens=False).ids] == ["", "", "", "🙂", "!"]


@given(text=st.text(alphabet="abc", max_size=30), stop=st.text(alphabet="abc", min_size=1, max_size=4), data=st.data())
def test_a_stop_string_ends_the_text_wherever_the_tokens_cut_it(text: str, stop: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stops = StopStrings([stop])
    told = "".join(stops.push(piece) for piece in pieces) + stops.flush()

    assert told == text.split(stop, maxsplit=1)[0]
    assert stops.is_found == (stop in text)


def test_what_only_began_like_a_stop_string_is_told_in_the_end() -> None:
    stops = StopStrings(["END"])

    assert stops.push("the EN") == "the "
    assert stops.push("emy") == "ENemy"
    assert stops.push(" E") == " "
    assert stops.flush() == "E"
