"""Runs that begin with a tuned model's weights."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.core import manifest
from app.core.events import Evaluated, Event, Finished, Noted, Started, Stepped
from app.core.spec import PreferenceSpec, Start, TrainSpec
from tests.training import make
from tests.training.make import Runner
from worker.model import adapter
from worker.model.base import LoadedBase
from worker.training.failures import StartRefused

DPO = PreferenceSpec(method="dpo", beta=0.3)


class Killed(BaseException):
    """As SIGKILL: nobody gets to write anything."""


@pytest.fixture(scope="module")
def tuned(tiny: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an adapter that has learnt something."""
    runner = Runner(tiny, tmp_path_factory.mktemp("tuned"))
    runner.go(make.spec(n_epochs=4))
    return runner.paths.output


def continuing(tuned: Path, *, seed: int = 7, **changes: object) -> TrainSpec:
    start = Start(model="ft:tuned", digest=manifest.read(tuned).digest)
    return make.spec(continue_from=start, seed=seed, micro_batch_tokens=300, **changes)


def killed_after(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return listen


def test_a_run_begins_with_the_weights_it_continues_and_a_fresh_schedule(tiny: LoadedBase, tuned: Path, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, start=tuned)
    asked = continuing(tuned, optimizer={"learning_rate": 1e-9})  # too small a rate to leave where it began
    result = runner.go(asked)
    began, ended = (load_file(directory / adapter.WEIGHTS) for directory in (tuned, runner.paths.output))

    assert isinstance(result, Finished) and [event.step for event in runner.of(Stepped)] == list(range(1, 7))
    assert all(torch.allclose(ended[name], tensor, atol=1e-7) for name, tensor in began.items())
    said = manifest.read(runner.paths.output)
    assert said.spec["continue_from"] == {"model": "ft:tuned", "digest": manifest.read(tuned).digest}
    assert said.step == 6


@pytest.mark.parametrize(("preference", "dropout", "examples"), [(None, 0.0, make.examples), (DPO, 0.1, make.preferences)])
def test_a_killed_and_resumed_run_gives_the_same_bits(
    tiny: LoadedBase, tuned: Path, tmp_path: Path, preference: PreferenceSpec | None, dropout: float, examples: object
) -> None:
    asked = continuing(tuned, preference=preference, lora={"dropout": dropout})
    straight, killed = (
        Runner(tiny, tmp_path / name, True, examples=examples, start=tuned)  # type: ignore[arg-type]  # one of two functions
        for name in "ab"
    )
    straight.go(asked)
    killed.listener = killed_after(3)
    with pytest.raises(Killed):
        killed.go(asked)
    killed.listener = lambda event: None
    torch.manual_seed(99)
    killed.go(asked)

    assert killed.of(Started)[1].resumed_from == 2
    assert killed.weights == straight.weights
    (last_of_killed, last) = (runner.of(Evaluated)[-1] for runner in (killed, straight))
    assert last_of_killed == last


def test_answers_are_compared_with_those_of_the_model_that_is_continued(tiny: LoadedBase, tuned: Path, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, True, examples=make.preferences, start=tuned)
    runner.go(continuing(tuned, preference=DPO))
    first, *_, last = runner.of(Stepped)

    assert first.train_loss == pytest.approx(math.log(2), rel=1e-6)  # it has not moved from there yet
    assert set(first.rewards.values()) == {0.0}
    assert last.rewards["rewards/margin"] > 0
    assert runner.of(Evaluated)[-1].rewards["valid_rewards/margin"] != 0


def test_ratings_are_measured_from_the_model_that_is_continued(tiny: LoadedBase, tuned: Path, tmp_path: Path) -> None:
    runner = Runner(tiny, tmp_path, examples=make.ratings, start=tuned)
    runner.go(continuing(tuned, preference=PreferenceSpec(method="kto", beta=0.3)))
    first, *_, last = runner.of(Stepped)

    assert set(first.rewards.values()) == {0.0} and first.train_loss == 0.5
    assert last.rewards["rewards/chosen"] != 0


def test_a_checkpoint_of_a_run_from_another_start_is_not_gone_on_from(tiny: LoadedBase, tuned: Path, tmp_path: Path) -> None:
    fresh, runner = Runner(tiny, tmp_path / "run"), Runner(tiny, tmp_path / "run", start=tuned)
    asked = continuing(tuned)
    fresh.go(asked.model_copy(update={"continue_from": None}), should_stop=fresh.stop_after(2))
    runner.go(asked)

    assert runner.of(Started)[0].resumed_from == 0
    assert "another run" in runner.of(Noted)[0].message


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("deleted", "has been deleted"), ("other files", "not those"), ("damaged", "differs from its digest"), ("rank", "shape")],
)
def test_only_the_named_adapter_is_begun_with(tiny: LoadedBase, tuned: Path, tmp_path: Path, wrong: str, reason: str) -> None:
    asked, directory = continuing(tuned), tmp_path / "start"
    directory.mkdir()
    for path in tuned.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    match wrong:
        case "other files":
            asked = asked.model_copy(update={"continue_from": Start(model="ft:tuned", digest="0" * 64)})
        case "damaged":
            (directory / adapter.CONFIG).write_text("{}")
        case "rank":
            asked = asked.model_copy(update={"lora": asked.lora.model_copy(update={"rank": 8})})
    with pytest.raises(StartRefused, match=rf"ft:tuned cannot be continued: .*{reason}"):
        Runner(tiny, tmp_path / "run", start=None if wrong == "deleted" else directory).go(asked)
