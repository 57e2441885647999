"""From a grid to jobs: values from values."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.core.errors import BadRequest
from app.sweeps.schemas import SweepCreate, TrialOut
from app.sweeps.service import best_of
from app.sweeps.trials import expand
from tests.make import TINY

RATES, RANKS = [1e-4, 2e-4], [8, 16, 32]


def asked(**changes: Any) -> SweepCreate:
    body: dict[str, Any] = {
        "model": TINY,
        "training_file": "file-a",
        "validation_file": "file-b",
        "grid": {"training.learning_rate": RATES, "adapter.rank": RANKS},
    }
    return SweepCreate.model_validate(body | changes)


def test_each_combination_is_a_job_with_all_else_that_was_said() -> None:
    trials = expand(asked(suffix="mine", training={"scheduler": "linear"}, adapter={"alpha": 4}))

    said = [(trial.job.training.learning_rate, trial.job.adapter.rank) for trial in trials]
    assert said == [(rate, rank) for rate in RATES for rank in RANKS]
    assert trials[1].values == {"training.learning_rate": 1e-4, "adapter.rank": 16}
    assert [trial.job.suffix for trial in trials] == [f"mine-{n}" for n in range(1, 7)]
    assert {(trial.job.training.scheduler, trial.job.adapter.alpha, trial.job.validation_file) for trial in trials} == {
        ("linear", 4.0, "file-b")
    }
    assert trials[0].job.adapter.model_fields_set == {"alpha", "rank"}  # a model that is continued gives the rest


def test_all_share_a_seed_that_nobody_asked_for() -> None:
    assert len({trial.job.seed for trial in expand(asked())}) == 1 != expand(asked())[0].job.seed
    assert len({trial.job.seed for trial in expand(asked(seed=None))}) == 1
    assert {trial.job.seed for trial in expand(asked(seed=3))} == {3}
    assert [trial.job.seed for trial in expand(asked(grid={"seed": [1, 2]}))] == [1, 2]


def test_a_path_may_lead_through_what_was_not_said() -> None:
    betas = asked(
        method={"type": "dpo"},
        grid={"method.dpo.hyperparameters.n_epochs": [1, 2], "training.early_stopping": [None, {"patience": 2}]},
    )
    jobs = [trial.job for trial in expand(betas)]

    assert [(job.method_name, job.requested().hyperparameters.n_epochs) for job in jobs] == [("dpo", n) for n in (1, 1, 2, 2)]
    assert [job.training.early_stopping is not None for job in jobs] == [False, True, False, True]


def test_a_part_of_what_another_path_sets_is_set_in_its_own_jobs_alone() -> None:
    """Values of the grid are shared by jobs, and must not be changed in one for all."""
    grid = {"training.early_stopping": [{"patience": 2}], "training.early_stopping.patience": [5, 6]}
    request = asked(grid=grid)

    assert [trial.job.training.early_stopping.patience for trial in expand(request) if trial.job.training.early_stopping] == [
        5,
        6,
    ]
    assert request.grid["training.early_stopping"] == [{"patience": 2}]


def test_a_random_search_draws_the_same_by_the_same_seed_and_none_twice() -> None:
    grid = {"training.learning_rate": [n / 1000 for n in range(1, 51)], "adapter.rank": [2, 4, 8, 16]}
    first, again, other = (
        [trial.values for trial in expand(asked(grid=grid, random={"trials": 20, "seed": seed}))] for seed in (1, 1, 2)
    )
    everything = [trial.values for trial in expand(asked(random={"trials": 6}))]

    assert first == again != other
    assert len({tuple(values.items()) for values in first}) == 20
    assert everything == [trial.values for trial in expand(asked())]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"grid": {"adapter.rnak": [1]}}, "adapter.rnak", "not a known parameter"),
        ({"grid": {"adapter.rank": [8, 4096]}}, "adapter.rank", r'trial 2, {"adapter.rank": 4096}'),
        ({"grid": {"suffix": ["a"]}}, "grid.suffix", "nothing that jobs of a sweep can differ in"),
        ({"grid": {"grid.seed": [1]}}, "grid.grid.seed", "nothing that"),
        ({"grid": {"model.size": [1]}}, "grid.model.size", "no parts to set"),
        ({"grid": {"adapter.rank": [8, 8]}}, "grid.adapter.rank", "twice"),
        ({"grid": {"seed": list(range(60)), "adapter.rank": [8, 16]}}, "grid", "120 combinations"),
        ({"random": {"trials": 7}}, "random.trials", "6 combinations"),
        ({"validation_file": None}, "validation_file", "compares by validation"),
        ({"grid": {"validation_file": ["file-b", None]}}, "validation_file", "compares by validation"),
        ({"grid": {"training.max_seq_length": [64, 128]}}, "grid", "differ in training.max_seq_length"),
        ({"grid": {"model": [TINY, "smollm2-135m-instruct"]}}, "grid", "differ in model"),
        ({"method": {"type": "dpo"}, "grid": {"method.dpo.hyperparameters.beta": [0.1, 0.2]}}, "grid", "differ in beta"),
        (
            {"validation_file": None, "training": {"validation_split": 2}, "grid": {"seed": [1, 2]}},
            "grid",
            "differ in seed",
        ),
        ({"method": {"type": "dpo"}, "grid": {"continue_from": ["ft:a", "ft:b"]}}, "grid", "differ in continue_from"),
    ],
)
def test_what_cannot_be_swept_is_told(changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        expand(asked(**changes))

    assert refused.value.param == param


def test_where_evaluations_decide_anything_may_differ() -> None:
    metric = {"type": "evaluation", "file": "file-e", "grader": "g"}
    grid = {"training.max_seq_length": [64, 128], "model": [TINY, "smollm2-135m-instruct"]}

    assert len(expand(asked(grid=grid, metric=metric))) == 4


def test_values_are_simple() -> None:
    with pytest.raises(ValidationError):
        asked(grid={"training.early_stopping": [{"patience": {"deep": {}}}]})
    with pytest.raises(BadRequest, match="of one job"):
        asked(dry_run=True)


@pytest.mark.parametrize(
    ("scores", "is_lowest_best", "best", "ties"),
    [
        ([None, 2.0, 1.0], True, 2, []),
        ([None, 2.0, 1.0], False, 1, []),
        ([3.0, 1.0, 1.0], True, 1, [2]),
        ([None, None, None], True, None, []),
    ],
)
def test_the_best_is_the_first_of_equals_and_failures_do_not_count(
    scores: list[float | None], is_lowest_best: bool, best: int | None, ties: list[int]
) -> None:
    told = [
        TrialOut(job=str(n), status="failed", values={}, user_provided_suffix=None, fine_tuned_model=None, score=score)
        for n, score in enumerate(scores)
    ]
    found = best_of(told, is_lowest_best=is_lowest_best)

    assert (found and int(found.job)) == best
    assert (found.tied_with if found else []) == [str(n) for n in ties]
