"""A gate decides by the numbers of its evaluation, and says them."""

from typing import Any

import pytest

from app.core.quality_gate import QualityGate, Stage


def gate(margin: float, confidence: float | None = None) -> QualityGate:
    asked = QualityGate(evaluation="eval_a", grader="exact", against="base", margin=margin, confidence=confidence, model="ours")
    return asked.evaluating(compared_with="base", evaluation_run="eval_b")


def found(difference: float | None, low: float | None = None, grader: str = "exact") -> dict[str, Any]:
    compared = {"model": "ours", "grader": grader, "difference": difference, "low": low, "high": 0.9, "rows": 20}
    other = compared | {"grader": "other", "difference": 1.0, "low": 1.0}
    means = {"exact": {"mean": 0.5}, "other": {"mean": 0.1}}
    models = [{"model": "base", "grades": means | {"exact": {"mean": 0.25}}}, {"model": "ours", "grades": means}]
    return {"models": models, "comparisons": [other, compared]}


@pytest.mark.parametrize(
    ("margin", "confidence", "difference", "low", "stage"),
    [
        (0.25, None, 0.25, -0.1, Stage.PASSED),  # the margin itself is enough, whatever the interval
        (0.25, None, 0.2, 0.1, Stage.FAILED),
        (0.0, None, 0.0, 0.0, Stage.FAILED),  # as good is not better
        (0.0, None, 1e-9, -0.1, Stage.PASSED),
        (0.0, None, -0.1, -0.2, Stage.FAILED),
        (1.0, None, 1.0, 1.0, Stage.PASSED),
        (0.25, 0.95, 0.5, 0.2, Stage.FAILED),
        (0.25, 0.95, 0.5, 0.25, Stage.PASSED),
        (0.0, 0.95, 0.5, 0.0, Stage.FAILED),
    ],
)
def test_the_margin_is_reached_by_the_difference_or_with_confidence_by_its_lower_end(
    margin: float, confidence: float | None, difference: float, low: float, stage: Stage
) -> None:
    decided = gate(margin, confidence).decided(found(difference, low))

    assert decided.stage is stage
    assert (decided.score, decided.compared_score, decided.difference, decided.low, decided.rows) == (
        0.5,
        0.25,
        difference,
        low,
        20,
    )


def test_a_verdict_says_its_numbers() -> None:
    told = gate(0.25, 0.95).decided(found(0.5, 0.2)).told()

    assert told == (
        "ours scored 0.5000 and base 0.2500 by 'exact' on 20 rows: a difference of 0.5000, 95% interval 0.2000 to 0.9000, "
        "where at least 0.25 was asked for of its lower end"
    )
    assert gate(0).decided(found(0.0, 0.0)).told().endswith("where more than 0 was asked for")


@pytest.mark.parametrize("results", [found(None), found(0.5, 0.5, grader="another"), {"models": [], "comparisons": []}])
def test_without_a_row_that_both_have_a_score_for_there_is_no_verdict(results: dict[str, Any]) -> None:
    decided = gate(0).decided(results)

    assert (decided.stage, decided.reason) == (Stage.UNDECIDED, "no row has a score of both models by 'exact'")
