"""What a trained model has to show before it goes live, and what it has shown: values, decided by values."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.core.statistics import LEVEL


class Stage(StrEnum):
    """Where a gate is. `undecided`: there is no verdict and will be none, `reason` says why."""

    PENDING = "pending"
    EVALUATING = "evaluating"
    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


class QualityGate(BaseModel):
    """A job's gate, as it is stored with the job and shown to its owner.

    `evaluation_run` puts the rows of `evaluation` to `model` and to `compared_with`, what `against` stood for when it began.
    Each has its mean score by `grader`; `difference`, `low` and `high` are over the `rows` that both have a score for. With a
    `confidence` the lower end of the interval has to reach the margin, else the difference itself.
    """

    model_config = ConfigDict(frozen=True)

    evaluation: str
    grader: str
    against: str
    margin: float
    confidence: float | None
    stage: Stage = Stage.PENDING
    model: str | None = None
    compared_with: str | None = None
    evaluation_run: str | None = None
    score: float | None = None
    compared_score: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int | None = None
    reason: str | None = None

    def evaluating(self, *, compared_with: str, evaluation_run: str) -> "QualityGate":
        begun = {"stage": Stage.EVALUATING, "compared_with": compared_with, "evaluation_run": evaluation_run}
        return self.model_copy(update=begun)

    def undecided(self, reason: str) -> "QualityGate":
        return self.model_copy(update={"stage": Stage.UNDECIDED, "reason": reason})

    def decided(self, results: Mapping[str, Any]) -> "QualityGate":
        """By the results of its evaluation. More is asked than no difference at all, also where the margin is 0."""
        means = {told["model"]: told["grades"][self.grader]["mean"] for told in results["models"]}
        comparisons = (told for told in results["comparisons"] if told["grader"] == self.grader and told["model"] == self.model)
        compared = next(comparisons, None)
        if compared is None or compared["difference"] is None:
            return self.undecided(f"no row has a score of both models by {self.grader!r}")
        reached = compared["difference"] if self.confidence is None else compared["low"]
        shown = {name: compared[name] for name in ("difference", "low", "high", "rows")}
        scores = {"score": means[self.model], "compared_score": means[self.compared_with]}
        stage = Stage.PASSED if reached >= self.margin and reached > 0 else Stage.FAILED
        return self.model_copy(update={"stage": stage, **scores, **shown})

    def told(self) -> str:
        """A verdict in words."""
        asked = f"at least {self.margin:g}" if self.margin else "more than 0"
        of = "" if self.confidence is None else " of its lower end"
        return (
            f"{self.model} scored {self.score:.4f} and {self.compared_with} {self.compared_score:.4f} by {self.grader!r} on "
            f"{self.rows} rows: a difference of {self.difference:.4f}, {LEVEL:.0%} interval {self.low:.4f} to {self.high:.4f}, "
            f"where {asked} was asked for{of}"
        )
