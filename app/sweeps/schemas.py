"""What the endpoints of sweeps take and give."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from app.core.errors import BadRequest
from app.jobs.schemas import JobCreate
from app.schemas import Request, without_nul

MAX_JOBS = 64
MAX_COMBINATIONS = 1_000_000  # of which a random search takes its trials

Path = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
Scalar = (
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[str, StringConstraints(max_length=256), AfterValidator(without_nul)]
    | None
)
Value = Scalar | Annotated[list[Scalar], Field(max_length=64)] | Annotated[dict[str, Scalar], Field(max_length=16)]
Column = Annotated[list[Value], Field(min_length=1, max_length=MAX_JOBS)]
Reference = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(without_nul)]


class Random(Request):
    """So many different combinations of the grid, drawn by the seed."""

    trials: Annotated[int, Field(ge=1, le=MAX_JOBS, strict=True)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class ValidLossMetric(Request):
    """The validation loss of the adapter that a job has published: the lowest is best."""

    type: Literal["valid_loss"] = "valid_loss"


class EvaluationMetric(Request):
    """A grader's mean in the newest evaluation of a job's model on this file: the highest is best."""

    type: Literal["evaluation"]
    file: Reference
    grader: Reference


class SweepCreate(JobCreate):
    """What `POST /v1/fine_tuning/sweeps` takes: a job, and a `grid` of dotted names of its body with the values to try.

    Each combination is a job, or `random` draws some of them.
    """

    grid: Annotated[dict[Path, Column], Field(min_length=1, max_length=16)]
    random: Random | None = None
    metric: Annotated[ValidLossMetric | EvaluationMetric, Field(discriminator="type")] = ValidLossMetric()

    @model_validator(mode="after")
    def _is_for_many(self) -> "SweepCreate":
        if self.dry_run:
            message = "a dry run is of one job; send it to POST /v1/fine_tuning/jobs with one of the grid's values each"
            raise BadRequest(message, param="dry_run")
        return self


class TrialOut(BaseModel):
    """A job of the sweep, and what of the grid it has got. `score` is null until the metric is known of it."""

    job: str
    status: str
    values: dict[str, Any]
    user_provided_suffix: str | None
    fine_tuned_model: str | None
    score: float | None


class BestOut(BaseModel):
    """The first in the order of the grid of those with the best score; `tied_with` are the jobs of the others."""

    job: str
    fine_tuned_model: str | None
    values: dict[str, Any]
    score: float
    tied_with: list[str]


class SweepOut(BaseModel):
    """A sweep and its jobs, in the order of the grid. `best` is null until one has succeeded and has a score.

    `is_final`: all jobs have ended, and where evaluations decide, each that has succeeded has one.
    """

    id: str
    object: Literal["fine_tuning.sweep"] = "fine_tuning.sweep"
    created_at: int
    grid: dict[str, list[Any]]
    random: dict[str, Any] | None
    metric: dict[str, Any]
    seed: int | None
    jobs: list[TrialOut]
    status_counts: dict[str, int]
    best: BestOut | None
    is_final: bool
