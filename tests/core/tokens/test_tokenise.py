"""Traps 8, 10 and 11 of docs: what is labelled, what is dropped, and one rendering for training and serving."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.tokens import tokenise as module
from app.core.tokens.tokenise import TokenisedSet, tokenise
from tests.training import make
from worker.model import bytewise


def test_the_answer_and_its_end_are_labelled_and_nothing_else(tiny: Renderer) -> None:
    made = tokenise([make.chat(1, "Hi", "Yes")], tiny, max_seq_length=64)

    labelled = made.tokens_N[made.is_trained_N].tolist()
    assert labelled[-1] == bytewise.END_OF_TURN  # though it is also the padding token
    assert tiny.tokenizer.decode(labelled, skip_special_tokens=False) == "Yes<|im_end|>"


def test_training_tokens_begin_with_what_serving_sends(tiny: Renderer) -> None:
    asked = make.chat(1, "Grüße\n", "ja")
    made = tokenise([asked], tiny, max_seq_length=64)
    prompt = tiny.prompt(asked.messages[:1])

    assert made.tokens_N[: len(prompt)].tolist() == prompt
    assert not made.is_trained_N[: len(prompt)].any()
    assert made.is_trained_N[len(prompt)]


def test_a_tokenizer_that_adds_a_first_token_does_not_add_it_to_a_rendered_chat(tiny: Renderer) -> None:
    plain = tiny
    tokenizer = Tokenizer.from_str(plain.tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    renderer = Renderer(tokenizer, "{{ '<|endoftext|>' }}" + plain.template, plain.stop_ids, 64)
    made = tokenise([make.chat(1, "Hi", "Yes")], renderer, max_seq_length=64)

    assert renderer.plain("Hi")[0] == 0
    assert made.tokens_N.tolist() == [0, *plain.example(make.chat(1, "Hi", "Yes").messages).tokens]


def test_turns_of_weight_0_are_context_only(tiny: Renderer) -> None:
    messages = (Message("user", "a"), Message("assistant", "no", 0), Message("user", "b"), Message("assistant", "ok"))
    made = tokenise([Chat(messages, 1)], tiny, max_seq_length=64)

    labelled = made.tokens_N[made.is_trained_N].tolist()
    assert tiny.tokenizer.decode(labelled, skip_special_tokens=False) == "ok<|im_end|>"


def test_rows_that_are_too_long_are_dropped_and_named_never_cut(tiny: Renderer) -> None:
    rows = [make.chat(1, "Hi", "Yes"), make.chat(2, "x" * 100, "Yes"), make.chat(3, "Hi", "No")]
    made = tokenise(rows, tiny, max_seq_length=64)

    assert made.lines_E.tolist() == [1, 3]
    assert (made.dropped_count, made.dropped[0].line, made.dropped[0].code) == (1, 2, "row_too_long")
    assert "at most 64 are trained on" in made.dropped[0].message


def test_a_row_without_a_label_is_dropped_and_named_never_trained_on_as_zeros(tiny: Renderer) -> None:
    unlabelled = Chat((Message("user", "a"), Message("assistant", "b", 0)), 2)
    made = tokenise([make.chat(1, "Hi", "Yes"), unlabelled], tiny, max_seq_length=64)

    assert made.lines_E.tolist() == [1]
    assert (made.dropped_count, made.dropped[0].line, made.dropped[0].code) == (1, 2, "nothing_to_train")


def test_a_template_that_hides_the_end_of_turn_names_its_rows(tiny: Renderer) -> None:
    renderer = tiny
    hiding = renderer.template.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}")
    without_end = type(renderer)(renderer.tokenizer, hiding, renderer.stop_ids, 64)
    made = tokenise([make.chat(7, "Hi", "Yes")], without_end, max_seq_length=64)

    assert made.examples == 0
    assert made.dropped[0].code == "row_not_rendered"
    assert "end-of-turn" in made.dropped[0].message


def test_a_set_is_read_as_it_was_written(tiny: Renderer, tmp_path: Path) -> None:
    made = tokenise([*make.chats(5), make.chat(9, "x" * 200, "y")], tiny, max_seq_length=64)
    made.write(tmp_path / "set.safetensors")
    back = TokenisedSet.read(tmp_path / "set.safetensors")

    assert (back.sha256, back.dropped, back.dropped_count) == (made.sha256, made.dropped, 1)
    assert (back.examples, back.tokens, back.labelled_tokens) == (made.examples, made.tokens, made.labelled_tokens)
    assert back.longest == max(len(tiny.example(chat.messages).tokens) for chat in make.chats(5))


def test_the_digest_follows_what_is_trained_on(tiny: Renderer) -> None:
    assert make.examples(tiny).sha256 == make.examples(tiny).sha256
    assert make.examples(tiny).sha256 != make.examples(tiny, 11).sha256


def test_tokenising_does_without_torch() -> None:
    code = "import sys, app.core.tokens.tokenise, worker.model.card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_are_encoded_a_few_at_once_by_all_that_is_written_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte at once: tools count, which a template writes into every row, and so do bytes, not characters."""
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", 1000)
    tools = ({"type": "function", "function": {"name": "f", "description": "x" * 400}},)
    short, with_tools, wide = make.chat(1, "a", "b"), replace(make.chat(2, "a", "b"), tools=tools), make.chat(3, "日" * 150, "b")

    sizes = [[len(batch) for batch in module._batches([chat] * 10)] for chat in (short, with_tools, wide)]
    assert sizes == [[10], [2] * 5, [2] * 5]
