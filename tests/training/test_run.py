"""Whole runs of the tiny base."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from app.core import manifest
from app.core.events import Checkpointed, Evaluated, Event, Finished, Noted, Started, Stepped, Stopped
from app.core.manifest import Manifest
from app.core.spec import EarlyStopping
from app.core.tokens.tokenise import tokenise
from tests.make import chat_line
from tests.training import make
from tests.training.make import Runner
from worker.model import adapter
from worker.model.base import LoadedBase
from worker.training import __main__ as command
from worker.training.data import MicroBatch, Totals
from worker.training.failures import Diverged, NothingToTrain, failed
from worker.training.loss import Measured
from worker.training.trainee import Trainee, adapted


def test_a_run_says_what_it_does_and_leaves_an_adapter(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, has_validation=True)
    result = runner.go(make.spec())

    assert [event.kind for event in runner.said] == [
        "started", "stepped", "stepped", "evaluated", "checkpointed", "stepped", "stepped", "evaluated", "checkpointed",
        "stepped", "stepped", "evaluated", "examined", "finished",
    ]  # fmt: skip
    started, examples = runner.said[0], make.examples(tiny.renderer)
    assert isinstance(started, Started) and (started.total_steps, started.resumed_from) == (6, 0)
    assert isinstance(result, Finished) and (result.step, result.trained_tokens) == (6, 2 * examples.tokens)
    assert sum(event.labelled_tokens for event in runner.of(Stepped)) == 2 * examples.labelled_tokens
    opened = adapter.open(Path(result.directory), base=tiny, max_rank=4)
    assert any(b_OR.any() for _, b_OR in opened.modules.values())


def test_training_learns(runner: Runner) -> None:
    runner.go(make.spec(n_epochs=12))
    losses = [event.train_loss for event in runner.of(Stepped)]

    assert losses[-1] < 0.5 * losses[0]


def test_the_manifest_tells_where_the_adapter_comes_from(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, has_validation=True)
    runner.go(make.spec())
    said = Manifest.model_validate_json((runner.paths.output / manifest.NAME).read_bytes())

    assert said.spec == make.spec().model_dump(mode="json")
    assert said.dataset_sha256 == make.examples(tiny.renderer).sha256
    assert said.metrics["valid_loss"] == runner.of(Evaluated)[-1].valid_loss
    assert said.metrics["train_loss"] == runner.of(Stepped)[-1].train_loss


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_stopped_and_resumed_run_gives_the_same_bits(tiny: LoadedBase, tmp_path: Path, stop_after: int, dropout: float) -> None:
    asked = make.spec(lora={"dropout": dropout}, batch_size=5)
    straight, halting = Runner(tiny, tmp_path / "a", True), Runner(tiny, tmp_path / "b", True)
    straight.go(asked)

    stopped = halting.go(asked, should_stop=halting.stop_after(stop_after))
    torch.manual_seed(99)  # another process draws other numbers
    finished = halting.go(asked)

    assert stopped == Stopped(step=stop_after)
    assert halting.of(Started)[1].resumed_from == stop_after
    assert isinstance(finished, Finished) and finished.trained_tokens == straight.of(Finished)[0].trained_tokens
    assert halting.weights == straight.weights
    assert [event.train_loss for event in halting.of(Stepped)] == [event.train_loss for event in straight.of(Stepped)]


@pytest.mark.parametrize("lora", [{"dropout": 0.0}, {"dropout": 0.1}, {"use_dora": True}])
def test_a_run_that_computes_layers_again_gives_the_same_bits(tiny: LoadedBase, tmp_path: Path, lora: dict[str, Any]) -> None:
    asked = make.spec(lora=lora, neftune_noise_alpha=5)
    keeping, again = Runner(tiny, tmp_path / "a", True), Runner(tiny, tmp_path / "b", True)
    kept, computed = keeping.go(asked), again.go(asked, is_checkpointing=True)

    assert again.weights == keeping.weights
    assert [event.train_loss for event in again.of(Stepped)] == [event.train_loss for event in keeping.of(Stepped)]
    assert [event.valid_loss for event in again.of(Evaluated)] == [event.valid_loss for event in keeping.of(Evaluated)]
    assert isinstance(kept, Finished) and isinstance(computed, Finished)
    assert (kept.memory.is_checkpointing, computed.memory.is_checkpointing) == (False, True)


def test_stopping_between_micro_batches_loses_only_the_step(runner: Runner) -> None:
    asked, calls = make.spec(micro_batch_tokens=8), []
    stopped = runner.go(asked, should_stop=lambda: calls.append(1) or len(calls) > 6)  # four documents to a step

    assert stopped == Stopped(step=1)
    assert [event.step for event in runner.of(Checkpointed)] == [1]


def test_stopping_before_the_first_step_keeps_nothing(runner: Runner) -> None:
    assert runner.go(make.spec(), should_stop=lambda: True) == Stopped(step=0)
    assert not runner.paths.checkpoints.exists()


def test_a_stop_during_the_last_evaluation_is_resumed_to_the_same_end(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, has_validation=True)
    assert runner.go(make.spec(), should_stop=runner.stop_after(6)) == Stopped(step=6)
    assert isinstance(runner.go(make.spec()), Finished)
    assert len(runner.of(Stepped)) == 6


@pytest.mark.parametrize("damage", ["state/optimizer.safetensors", "adapter/adapter_model.safetensors", "state/manifest.json"])
def test_a_damaged_checkpoint_falls_back_by_one(runner: Runner, damage: str, tmp_path: Path) -> None:
    runner.go(make.spec(), should_stop=runner.stop_after(4))
    (runner.paths.checkpoints / "step-000004" / damage).write_bytes(b"{}")

    runner.go(make.spec())

    assert runner.of(Started)[1].resumed_from == 2
    assert "The checkpoint of step 4 is not used" in runner.of(Noted)[0].message


def test_another_run_s_checkpoint_is_neither_gone_on_from_nor_deleted(runner: Runner) -> None:
    runner.go(make.spec(n_epochs=4), should_stop=runner.stop_after(8))
    runner.go(make.spec(seed=2))

    assert runner.of(Started)[1].resumed_from == 0
    assert "another run" in runner.of(Noted)[0].message
    assert runner.kept == [2, 4, 6, 8]  # 6 and 8 are the other's


def test_the_last_two_checkpoints_are_kept_and_the_best(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = make.overfitting(tiny, tmp_path)
    runner.go(make.spec(n_epochs=4))
    judged = [event.valid_loss for event in runner.of(Evaluated)]

    assert judged[0] == min(judged)
    assert runner.kept == [2, 8, 10]


EARLY = {"early_stopping": EarlyStopping(patience=2), "n_epochs": 4}


def test_a_run_that_gains_nothing_stops_early_and_leaves_an_adapter(tiny: LoadedBase, tmp_path: Path) -> None:
    runner = make.overfitting(tiny, tmp_path)
    result = runner.go(make.spec(**EARLY))
    said = Manifest.model_validate_json((runner.paths.output / manifest.NAME).read_bytes())

    assert isinstance(result, Finished) and result.step == said.step == 6  # evaluated at 2, 4 and 6
    assert [event.step for event in runner.of(Evaluated)] == [2, 4, 6]
    assert runner.of(Noted)[0].message == ("Stopped early at step 6 of 12: the validation loss has not fallen in 2 evaluations.")


def test_a_run_that_gains_more_than_the_least_goes_on(tiny: LoadedBase, tmp_path: Path) -> None:
    patient, strict = Runner(tiny, tmp_path / "a", True), Runner(tiny, tmp_path / "b", True)
    patient.go(make.spec(early_stopping=EarlyStopping(patience=1)))
    strict.go(make.spec(early_stopping=EarlyStopping(patience=1, min_delta=100)))
    losses = [event.valid_loss for event in patient.of(Evaluated)]

    assert losses == sorted(losses, reverse=True) and len(losses) == 3
    assert [event.step for event in strict.of(Evaluated)] == [2, 4]
    assert "has not fallen by more than 100 in 1 evaluations" in strict.of(Noted)[0].message


@pytest.mark.parametrize("stop_after", [3, 5, 6])
def test_an_early_stop_and_the_best_are_the_same_after_a_resume(tiny: LoadedBase, tmp_path: Path, stop_after: int) -> None:
    asked = make.spec(**EARLY, publish="best")
    straight, halting = make.overfitting(tiny, tmp_path / "a"), make.overfitting(tiny, tmp_path / "b")
    straight.go(asked)
    halting.go(asked, should_stop=halting.stop_after(stop_after))
    finished = halting.go(asked)

    assert isinstance(finished, Finished) and finished.step == 6
    assert halting.weights == straight.weights


def test_the_best_is_published_when_asked_for(tiny: LoadedBase, tmp_path: Path) -> None:
    runner, last = make.overfitting(tiny, tmp_path / "a"), make.overfitting(tiny, tmp_path / "b")
    kept: dict[int, bytes] = {}

    def keep(event: Event) -> None:
        if isinstance(event, Checkpointed):
            kept[event.step] = (Path(event.directory) / "adapter" / "adapter_model.safetensors").read_bytes()

    runner.listener = keep
    result = runner.go(make.spec(n_epochs=4, publish="best"))
    last.go(make.spec(n_epochs=4))
    said = Manifest.model_validate_json((runner.paths.output / manifest.NAME).read_bytes())

    assert isinstance(result, Finished) and result.step == 12  # what was trained, and is paid for
    assert runner.weights == kept[2] != last.weights
    assert (said.step, said.kind) == (2, "adapter")
    assert said.metrics["valid_loss"] == min(event.valid_loss for event in runner.of(Evaluated))
    assert "that of step 2" in runner.of(Noted)[0].message


def test_the_last_is_published_where_it_is_the_best(tiny: LoadedBase, tmp_path: Path) -> None:
    runner, last = Runner(tiny, tmp_path / "a", True), Runner(tiny, tmp_path / "b", True)
    runner.go(make.spec(publish="best"))
    last.go(make.spec())

    assert runner.weights == last.weights and not runner.of(Noted)


def test_a_best_that_is_damaged_is_not_published(tiny: LoadedBase, tmp_path: Path) -> None:
    runner, last = make.overfitting(tiny, tmp_path / "a"), make.overfitting(tiny, tmp_path / "b")

    def lose(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == event.total_steps:
            shutil.rmtree(runner.paths.checkpoints / "step-000002")

    runner.listener = lose
    runner.go(make.spec(n_epochs=4, publish="best"))
    last.go(make.spec(n_epochs=4))

    assert runner.weights == last.weights
    assert "had the lowest validation loss, but its checkpoint is not used" in runner.of(Noted)[0].message


def test_without_validation_the_last_two_checkpoints_are_kept(runner: Runner) -> None:
    runner.go(make.spec(n_epochs=4))

    assert runner.kept == [8, 10]


def test_a_checkpoint_is_deleted_only_after_everybody_has_heard_of_the_next(runner: Runner) -> None:
    there = []
    runner.listener = lambda event: there.append(runner.kept) if isinstance(event, Checkpointed) else None
    runner.go(make.spec(n_epochs=4))

    assert there == [[2], [2, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]


def test_what_lies_ahead_of_the_checkpoint_gone_on_from_goes_with_the_next(runner: Runner) -> None:
    runner.go(make.spec(), should_stop=runner.stop_after(4))
    (runner.paths.checkpoints / "step-000004" / "state" / "optimizer.safetensors").write_bytes(b"{}")
    runner.said.clear()
    runner.go(make.spec(), should_stop=runner.stop_after(3))

    assert runner.kept == [2, 3]


def test_what_killed_writers_left_is_removed_and_never_counts(runner: Runner) -> None:
    runner.go(make.spec(), should_stop=runner.stop_after(4))
    whole = runner.paths.checkpoints / "step-000004"
    half = whole.rename(whole.with_name(".step-000004.abcd"))
    (half / "state" / "manifest.json").unlink()
    runner.go(make.spec())

    assert runner.of(Started)[1].resumed_from == 2
    assert not half.exists()


def test_a_checkpoint_is_itself_an_adapter(runner: Runner, tiny: LoadedBase) -> None:
    runner.go(make.spec())
    directory = Path(runner.of(Checkpointed)[0].directory)

    assert adapter.open(directory / "adapter", base=tiny, max_rank=4).modules
    said = Manifest.model_validate_json((directory / "state" / manifest.NAME).read_bytes())
    assert manifest.problems_in(directory / "state", said) == []


def poison(monkeypatch: pytest.MonkeyPatch, is_poisoned: Callable[[int], bool]) -> None:
    """Make the loss of some micro-batches, counted from 1, infinite."""
    calls, honest = [], Trainee.backward

    def backward(trainee: Trainee, batch: MicroBatch, *, of: Totals) -> Measured:
        calls.append(1)
        found = honest(trainee, batch, of=of)
        return replace(found, loss_sum=found.loss_sum * math.inf) if is_poisoned(len(calls)) else found

    monkeypatch.setattr(Trainee, "backward", backward)


def test_a_step_without_a_finite_gradient_never_reaches_the_weights(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call == 2)
    runner.go(make.spec(micro_batch_tokens=1000))

    assert [event.step for event in runner.of(Stepped)] == [1, 3, 4, 5, 6]
    assert runner.of(Noted)[0].message == "Step 2 gave no finite gradient and was left out."
    assert adapter.open(runner.paths.output, base=runner.base, max_rank=4)


def test_a_run_that_stays_without_finite_gradients_fails_as_diverged(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call > 2)
    with pytest.raises(Diverged) as caught:
        runner.go(make.spec(micro_batch_tokens=1000))

    said = failed(caught.value)
    assert (said.code, said.is_user_error) == ("diverged", True)
    assert [event.step for event in runner.of(Stepped)] == [1, 2]
    assert [event.resumed_from for event in runner.of(Started)] == [0, 2]  # one more try, at half the rate
    assert not runner.paths.output.exists()


@pytest.mark.parametrize(("poisoned", "kept"), [(range(3, 6), 2), (range(1, 4), 0)])
def test_a_run_that_diverges_goes_on_once_from_its_checkpoint_at_half_the_rate(
    tiny: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: range, kept: int
) -> None:
    straight, diverging = Runner(tiny, tmp_path / "a"), Runner(tiny, tmp_path / "b")
    straight.go(make.spec(micro_batch_tokens=1000))
    poison(monkeypatch, lambda call: call in poisoned)
    result = diverging.go(make.spec(micro_batch_tokens=1000))

    assert isinstance(result, Finished) and result.step == 6
    assert "half the rate" in diverging.of(Noted)[-1].message
    rates = [(event.step, event.learning_rate) for event in straight.of(Stepped)]
    expected = rates[:kept] + [(step, rate / 2) for step, rate in rates[kept:]]
    assert [(event.step, event.learning_rate) for event in diverging.of(Stepped)] == expected


def test_a_file_without_a_usable_row_fails_with_that_reason(runner: Runner) -> None:
    tokenise([], runner.base.renderer, max_seq_length=8).write(runner.paths.dataset)
    with pytest.raises(NothingToTrain) as caught:
        runner.go(make.spec())

    assert failed(caught.value).is_user_error


def test_what_goes_wrong_inside_is_not_told_in_detail() -> None:
    said = failed(ValueError("secret path /srv/x"))

    assert (said.code, said.is_user_error) == ("internal_error", False)
    assert "secret" not in said.message


def command_line(folder: Path, bases_dir: Path, **asked: object) -> list[str]:
    """What `python -m worker.training` is told, with its files written."""
    rows = [json.dumps({"messages": [{"role": m.role, "content": m.content} for m in c.messages]}) for c in make.chats()]
    (folder / "data.jsonl").write_text("\n".join(rows))
    (folder / "spec.json").write_text(make.spec(**asked).model_dump_json())
    return [*(str(folder / name) for name in ("spec.json", "data.jsonl", "out")), "--cache-dir", str(bases_dir)]


def test_a_run_from_the_command_line(
    bases_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command_line(tmp_path, bases_dir)
    monkeypatch.setattr(sys, "argv", ["training", *asked, "--validation", asked[1]])

    command.main()

    said = capsys.readouterr().out
    assert "12 examples" in said and "step 6/6  loss" in said
    assert (tmp_path / "out" / "adapter" / "manifest.json").exists()


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_the_same_command_goes_on(bases_dir: Path, tmp_path: Path) -> None:
    asked = [
        sys.executable,
        "-m",
        "worker.training",
        *command_line(tmp_path, bases_dir, n_epochs=100, checkpoint_every_steps=1000),
    ]

    def interrupted() -> list[str]:
        with subprocess.Popen(
            asked, env=os.environ | {"TORCH_COMPILE_DISABLE": "1"}, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = [next(line for line in process.stdout if '"kind":"started"' in line), next(process.stdout)]
            process.send_signal(signal.SIGINT)
            said += process.stdout
        assert process.returncode == 0
        return said

    first = interrupted()
    last_step = json.loads(first[-1])["step"]
    assert json.loads(first[-1])["kind"] == "stopped" and last_step < 300
    assert json.loads(interrupted()[0])["resumed_from"] == last_step


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("spec.json", "{}", "TrainSpec"),
        ("spec.json", make.spec(base="nobody").model_dump_json(), "'nobody' is not in the catalog"),
        ("data.jsonl", '{"messages": []}', "line 1"),
        ("data.jsonl", chat_line("a" * 200, "b"), "no row of the training file can be trained on"),
        ("data.jsonl", None, r"No such file or directory: .*data\.jsonl"),
    ],
)
def test_what_the_command_line_cannot_use_is_said_without_a_traceback(
    bases_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str | None, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *command_line(tmp_path, bases_dir)])
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)

    with pytest.raises(SystemExit, match=said):
        command.main()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers by it
def test_plain_peft_loads_the_adapter_and_agrees(runner: Runner, exact: LoadedBase, tmp_path: Path) -> None:
    runner.go(make.spec())
    tokens = torch.arange(60).reshape(2, 30)
    with adapted(exact, make.spec()) as trainee:
        trainee.load(adapter.open(runner.paths.output, base=exact, max_rank=4))
        exact.model.config._attn_implementation = "sdpa"
        ours = exact.model(tokens).logits
    plain = exact.model(tokens).logits
    loaded = PeftModel.from_pretrained(exact.model, shutil.copytree(runner.paths.output, tmp_path / "copy"))
    theirs = loaded(tokens).logits
    loaded.unload()

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - plain).abs().max() > 1e-2
