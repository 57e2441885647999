"""Traps 8, 10 and 11 of docs: what is labelled, what is dropped, and one rendering for training and serving."""

import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.tokens.tokenise import TokenisedSet, tokenise
from tests.training import make
from worker.model import bytewise
from worker.model.base import LoadedBase


def test_the_answer_and_its_end_are_labelled_and_nothing_else(tiny: LoadedBase) -> None:
    made = tokenise([make.chat(1, "Hi", "Yes")], tiny.renderer, max_seq_length=64)

    labelled = made.tokens_N[made.is_trained_N].tolist()
    assert labelled[-1] == bytewise.END_OF_TURN  # though it is also the padding token
    assert tiny.renderer.tokenizer.decode(labelled, skip_special_tokens=False) == "Yes<|im_end|>"


def test_training_tokens_begin_with_what_serving_sends(tiny: LoadedBase) -> None:
    asked = make.chat(1, "Grüße\n", "ja")
    made = tokenise([asked], tiny.renderer, max_seq_length=64)
    prompt = tiny.renderer.prompt(asked.messages[:1])

    assert made.tokens_N[: len(prompt)].tolist() == prompt
    assert not made.is_trained_N[: len(prompt)].any()
    assert made.is_trained_N[len(prompt)]


def test_a_tokenizer_that_adds_a_first_token_does_not_add_it_to_a_rendered_chat(tiny: LoadedBase) -> None:
    plain = tiny.renderer
    tokenizer = Tokenizer.from_str(plain.tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    renderer = Renderer(tokenizer, "{{ '<|endoftext|>' }}" + plain.template, plain.stop_ids, 64)
    made = tokenise([make.chat(1, "Hi", "Yes")], renderer, max_seq_length=64)

    assert renderer.plain("Hi")[0] == 0
    assert made.tokens_N.tolist() == [0, *plain.example(make.chat(1, "Hi", "Yes").messages).tokens]


def test_turns_of_weight_0_are_context_only(tiny: LoadedBase) -> None:
    messages = (Message("user", "a"), Message("assistant", "no", 0), Message("user", "b"), Message("assistant", "ok"))
    made = tokenise([Chat(messages, 1)], tiny.renderer, max_seq_length=64)

    labelled = made.tokens_N[made.is_trained_N].tolist()
    assert tiny.renderer.tokenizer.decode(labelled, skip_special_tokens=False) == "ok<|im_end|>"


def test_rows_that_are_too_long_are_dropped_and_named_never_cut(tiny: LoadedBase) -> None:
    rows = [make.chat(1, "Hi", "Yes"), make.chat(2, "x" * 100, "Yes"), make.chat(3, "Hi", "No")]
    made = tokenise(rows, tiny.renderer, max_seq_length=64)

    assert made.lines_E.tolist() == [1, 3]
    assert (made.dropped_count, made.dropped[0].line, made.dropped[0].code) == (1, 2, "row_too_long")
    assert "at most 64 are trained on" in made.dropped[0].message


def test_a_row_without_a_label_is_dropped_and_named_never_trained_on_as_zeros(tiny: LoadedBase) -> None:
    unlabelled = Chat((Message("user", "a"), Message("assistant", "b", 0)), 2)
    made = tokenise([make.chat(1, "Hi", "Yes"), unlabelled], tiny.renderer, max_seq_length=64)

    assert made.lines_E.tolist() == [1]
    assert (made.dropped_count, made.dropped[0].line, made.dropped[0].code) == (1, 2, "nothing_to_train")


def test_a_template_that_hides_the_end_of_turn_names_its_rows(tiny: LoadedBase) -> None:
    renderer = tiny.renderer
    hiding = renderer.template.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}")
    without_end = type(renderer)(renderer.tokenizer, hiding, renderer.stop_ids, 64)
    made = tokenise([make.chat(7, "Hi", "Yes")], without_end, max_seq_length=64)

    assert made.examples == 0
    assert made.dropped[0].code == "row_not_rendered"
    assert "end-of-turn" in made.dropped[0].message


def test_a_set_is_read_as_it_was_written(tiny: LoadedBase, tmp_path: Path) -> None:
    made = tokenise([*make.chats(5), make.chat(9, "x" * 200, "y")], tiny.renderer, max_seq_length=64)
    made.write(tmp_path / "set.safetensors")
    back = TokenisedSet.read(tmp_path / "set.safetensors")

    assert (back.sha256, back.dropped, back.dropped_count) == (made.sha256, made.dropped, 1)
    assert (back.examples, back.tokens, back.labelled_tokens) == (made.examples, made.tokens, made.labelled_tokens)
    assert back.longest == max(len(tiny.renderer.example(chat.messages).tokens) for chat in make.chats(5))


def test_the_digest_follows_what_is_trained_on(tiny: LoadedBase) -> None:
    assert make.examples(tiny.renderer).sha256 == make.examples(tiny.renderer).sha256
    assert make.examples(tiny.renderer).sha256 != make.examples(tiny.renderer, 11).sha256


def test_tokenising_does_without_torch() -> None:
    code = "import sys, app.core.tokens.tokenise, worker.model.card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
