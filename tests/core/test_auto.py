"""What was left to us is told with the value that the run has, and with the rule that gave it."""

import pytest

from app.core import auto, catalog, planner, spec, tiers
from app.core.auto import Chosen
from app.core.planner import Run
from app.core.settings import GpuSettings

KNOWN = catalog.load()
SMALL, LARGE = KNOWN["smollm2-135m-instruct"], KNOWN["llama-3.1-8b-instruct"]
AUTOMATIC = {"n_epochs", "batch_size", "learning_rate_multiplier", "learning_rate", "max_seq_length", "checkpoint_every_steps"}


def explained(
    requested: spec.Requested, *, base: catalog.Base = SMALL, examples: int = 400, good: int = 0, tier: str = "cpu"
) -> tuple[spec.TrainSpec, dict[str, Chosen]]:
    resolved = spec.resolve(requested, base, seed=1, examples=examples, longest=90, good=good)
    run = Run(model=base.architecture, lora=resolved.lora, longest_tokens=90, mean_tokens=60, batch_size=resolved.batch_size)
    plan = planner.plan(run, [tiers.room(tier, GpuSettings())])
    return resolved, auto.explain(requested, resolved, base, plan, examples=examples, good=good)


def test_every_automatic_setting_is_told_as_it_was_resolved() -> None:
    resolved, told = explained(spec.Requested())

    assert told.keys() == AUTOMATIC | {"micro_batch_tokens"}
    assert told["n_epochs"] == Chosen(
        value=resolved.n_epochs, reason="so that about 800 examples are seen, in 1 to 10 epochs: 800 / 400 is 2.0"
    )
    assert (told["batch_size"].value, told["learning_rate"].value) == (resolved.batch_size, resolved.optimizer.learning_rate)
    assert told["checkpoint_every_steps"].value == resolved.checkpoint_every_steps
    assert told["checkpoint_every_steps"].reason == "4 in the 68 steps"
    assert told["max_seq_length"].value == resolved.max_seq_length


def test_what_kto_chooses_is_told_too() -> None:
    _, told = explained(spec.Requested(method="kto"), good=100)

    assert told.keys() == AUTOMATIC | {"micro_batch_tokens", "beta", "desirable_weight", "undesirable_weight"}
    assert told["desirable_weight"].value == 3.0 and "100 good and 300 bad answers" in told["desirable_weight"].reason
    assert told["beta"] == Chosen(value=0.1, reason="as in the paper (arXiv:2402.01306)")
    assert "with 8 to 16 rows" in told["batch_size"].reason
    assert told["learning_rate"].reason.startswith("0.1 times that of supervised training where the base judges answers")
    given = explained(spec.Requested(method="kto", desirable_weight=2.0), good=100)[1]
    assert "desirable_weight" not in given
    assert given["undesirable_weight"] == Chosen(value=1.0, reason="the other weight was given")


def test_what_was_asked_for_is_not_explained() -> None:
    asked = spec.Requested(
        hyperparameters=spec.Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.5),
        training=spec.TrainingOptions(max_seq_length=128, checkpoint_every_steps=7, learning_rate=1e-4),
    )

    assert explained(asked)[1].keys() == {"micro_batch_tokens"}


@pytest.mark.parametrize(("base", "rate"), [(SMALL, 1e-3), (LARGE, 2e-4)])
def test_the_rate_follows_from_the_size_of_the_base_and_the_multiplier(base: catalog.Base, rate: float) -> None:
    asked = spec.Requested(hyperparameters=spec.Hyperparameters(learning_rate_multiplier=0.5))
    told = explained(asked, base=base, tier="24")[1]["learning_rate"]

    assert told.value == pytest.approx(rate / 2)
    assert told.reason.endswith("times learning_rate_multiplier 0.5") and f"{rate:g}" in told.reason


def test_evaluations_that_decide_come_more_often() -> None:
    plain, judged = (
        explained(spec.Requested(training=spec.TrainingOptions(publish=publish)))[1]["checkpoint_every_steps"]
        for publish in ("last", "best")
    )

    assert (plain.value, judged.value) == (17, 7)
    assert judged.reason.startswith("10 in the 68 steps, because their evaluations decide")


def test_the_tokens_at_once_name_what_bounds_them() -> None:
    assert "on a CPU" in explained(spec.Requested())[1]["micro_batch_tokens"].reason
    assert "a GPU of 16 GB" in explained(spec.Requested(), base=LARGE, tier="16")[1]["micro_batch_tokens"].reason
