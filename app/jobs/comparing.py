"""Jobs side by side: in what they differ, how they went, what has become of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.core import spec
from app.core.clock import unix
from app.core.errors import BadRequest, NotFound
from app.core.prices import Price, PriceBook
from app.evaluations import service as evaluations
from app.jobs import results
from app.jobs import service as jobs
from app.jobs.curves import ValidationPoint, validation_of
from app.jobs.schemas import status_of
from app.models import Evaluation, Job, JobCheckpoint
from app.schemas import Failure

FEWEST, MOST = 2, 20
_UNCHARTED = {"step", "total_steps", "tokens", "labelled_tokens", "tokens_left"}


class Point(BaseModel):
    """`tokens` are all that had been trained on by then. `metrics` have the names that they have in the job's events."""

    step: int
    tokens: int
    metrics: dict[str, float]


class Curves(BaseModel):
    """By step. Of long ones some points are left out, never the first and the last."""

    train: list[Point]
    validation: list[Point]


class ValidLoss(BaseModel):
    step: int
    valid_loss: float


class ValidLosses(BaseModel):
    """Of the last evaluation and of the lowest; `published` is that of the adapter which `fine_tuned_model` names."""

    final: ValidLoss
    best: ValidLoss
    published: float | None


class Score(BaseModel):
    """A mean with its interval: null where no row could be scored."""

    mean: float | None
    low: float | None
    high: float | None
    rows: int


class EvaluatedModel(BaseModel):
    """What an evaluation says of one of the job's models, by grader; `grades` is null until it has succeeded."""

    id: str
    name: str | None
    status: str
    file: str
    model: str
    grades: dict[str, Score] | None
    url: str


class ComparedJob(BaseModel):
    """`requested` and `resolved` hold those settings alone that are not the same in all jobs compared, by dotted names.

    `resolved` is null until the job's files have been looked at. The price is of the tokens trained on, or of those to come.
    """

    id: str
    status: str
    model: str
    base_model: str
    continue_from: str | None
    fine_tuned_model: str | None
    user_provided_suffix: str | None
    metadata: dict[str, str] | None
    error: Failure | None
    created_at: int
    finished_at: int | None
    duration_seconds: float | None
    worker_seconds: float
    trained_tokens: int | None
    price: Price | None
    requested: dict[str, Any]
    resolved: dict[str, Any] | None
    validation: ValidLosses | None
    held_out: dict[str, Any] | None
    curves: Curves
    evaluations: list[EvaluatedModel]


class ComparisonOut(BaseModel):
    """Jobs in the order in which they were named."""

    object: Literal["fine_tuning.job.comparison"] = "fine_tuning.job.comparison"
    data: list[ComparedJob]


@dataclass(frozen=True)
class _Differences:
    """By job, flat, and without what all of them have in common."""

    requested: Mapping[str, dict[str, Any]]
    resolved: Mapping[str, dict[str, Any]]


def compare(session: orm.Session, caller: Caller, ids: Sequence[str], *, points: int | None, prices: PriceBook) -> ComparisonOut:
    """With curves of so many points, or without any: long runs take long to read.

    Raises NotFound, naming the jobs that do not exist or are not the caller's; BadRequest for too few or too many.
    """
    found = _named(session, caller, ids)
    differences = _Differences(
        requested=differing({job.id: _requested(job) for job in found}),
        resolved=differing({job.id: flat(spec.TrainSpec.model_validate(job.spec)) for job in found if job.spec}),
    )
    evaluated = _evaluated(session, caller, found)
    return ComparisonOut(data=[_compared(session, job, differences, evaluated[job.id], points, prices) for job in found])


def _named(session: orm.Session, caller: Caller, ids: Sequence[str]) -> list[Job]:
    """`ids` as they came: separated by commas, repeated, or both."""
    wanted = list(dict.fromkeys(id_ for part in ids for id_ in part.split(",") if id_))
    if not FEWEST <= len(wanted) <= MOST:
        message = f"ids names {len(wanted)} different jobs; name {FEWEST} to {MOST}, as ids=a,b or ids=a&ids=b"
        raise BadRequest(message, param="ids")
    found = {job.id: job for job in jobs.find_all(session, caller, wanted)}
    if missing := [id_ for id_ in wanted if id_ not in found]:
        message = f"these jobs do not exist or are not yours: {', '.join(missing)}; GET /v1/fine_tuning/jobs lists yours"
        raise NotFound(message[:2000], param="ids", code="job_not_found")
    return [found[id_] for id_ in wanted]


def _requested(job: Job) -> dict[str, Any]:
    """Named as in the body that made the job."""
    named = {
        "model": job.requested_model,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "seed": job.seed,
        "continue_from": job.continue_from,
    }
    settings = flat(spec.Requested.model_validate(job.request))
    return named | {name: value for name, value in settings.items() if not name.startswith("continue_from")}


def flat(value: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names, the default ones too."""
    told = dict[str, Any]()
    for name, held in value:
        told |= flat(held, f"{prefix}{name}.") if isinstance(held, BaseModel) else {f"{prefix}{name}": held}
    return told


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each one the settings that are not the same in all; null for what it does not have."""
    names = dict.fromkeys(name for one in settings.values() for name in one)
    differ = [name for name in names if len({repr(one.get(name)) for one in settings.values()}) > 1]
    return {key: {name: one.get(name) for name in differ} for key, one in settings.items()}


def _compared(
    session: orm.Session,
    job: Job,
    differences: _Differences,
    evaluated: list[EvaluatedModel],
    points: int | None,
    prices: PriceBook,
) -> ComparedJob:
    took = job.finished_at - job.started_at if job.finished_at and job.started_at else None
    tokens = job.total_tokens if job.trained_tokens is None else job.trained_tokens
    return ComparedJob(
        id=job.id,
        status=status_of(job.state),
        model=job.requested_model,
        base_model=job.base,
        continue_from=job.continue_from,
        fine_tuned_model=job.fine_tuned_model,
        user_provided_suffix=job.suffix,
        metadata=job.user_metadata,
        error=Failure.model_validate(job.error) if job.error else None,
        created_at=unix(job.created_at),
        finished_at=unix(job.finished_at),
        duration_seconds=took.total_seconds() if took else None,
        worker_seconds=job.worker_seconds,
        trained_tokens=job.trained_tokens,
        price=prices.price(job.base, tokens) if tokens is not None else None,
        requested=differences.requested[job.id],
        resolved=differences.resolved.get(job.id),
        validation=_valid_losses(job, validation_of(session, job.id)),
        held_out=job.held_out,
        curves=_curves(session, job, points) if points is not None else Curves(train=[], validation=[]),
        evaluations=evaluated,
    )


def _curves(session: orm.Session, job: Job, points: int) -> Curves:
    train, validation = curves_of(results.steps_of(session, job.id))
    return Curves(train=thinned(train, points), validation=thinned(validation, points))


def curves_of(steps: Mapping[int, Mapping[str, Any]]) -> tuple[list[Point], list[Point]]:
    """Train and validation, from all that was measured at each step."""
    train, validation, tokens = list[Point](), list[Point](), 0
    for step in sorted(steps):
        measured = steps[step]
        tokens += measured.get("tokens", 0)
        charted = {name: value for name, value in measured.items() if name not in _UNCHARTED}
        of_validation = {name: charted.pop(name) for name in list(charted) if name.startswith("valid_")}
        for curve, metrics in ((train, charted), (validation, of_validation)):
            if metrics:
                curve.append(Point(step=step, tokens=tokens, metrics=metrics))
    return train, validation


def thinned(curve: Sequence[Point], points: int) -> list[Point]:
    """At most so many, evenly apart by their number, the first and the last among them."""
    if len(curve) <= points:
        return list(curve)
    last = len(curve) - 1
    return [curve[round(n * last / (points - 1))] for n in range(points)]


def _valid_losses(job: Job, validation: Sequence[ValidationPoint]) -> ValidLosses | None:
    losses = [ValidLoss(step=point.step, valid_loss=point.loss) for point in validation]
    if not losses:
        return None
    return ValidLosses(final=losses[-1], best=min(losses, key=lambda one: one.valid_loss), published=job.valid_loss)


def _evaluated(session: orm.Session, caller: Caller, found: Sequence[Job]) -> dict[str, list[EvaluatedModel]]:
    """By job, the newest evaluations first: those that ask its model, or one of its checkpoints."""
    of_model = {job.fine_tuned_model: job.id for job in found if job.fine_tuned_model}
    checkpoints = select(JobCheckpoint.fine_tuned_model, JobCheckpoint.job_id)
    of_job = checkpoints.where(JobCheckpoint.job_id.in_([job.id for job in found]))
    of_model |= {checkpoint.fine_tuned_model: checkpoint.job_id for checkpoint in session.execute(of_job)}
    told = {job.id: list[EvaluatedModel]() for job in found}
    for evaluation in evaluations.list_naming(session, caller, list(of_model)):
        for model in _asked(evaluation, of_model):
            told[of_model[model]].append(_told(evaluation, model))
    return told


def _asked(evaluation: Evaluation, of_model: Mapping[str, str]) -> Iterator[str]:
    return (model for model in evaluation.request["models"] if model in of_model)


def _told(evaluation: Evaluation, model: str) -> EvaluatedModel:
    return EvaluatedModel(
        id=evaluation.id,
        name=evaluation.name,
        status=evaluation.state,
        file=evaluation.file_id,
        model=model,
        grades=grades_of(evaluation, model),
        url=f"/v1/evaluations/{evaluation.id}",
    )


def grades_of(evaluation: Evaluation, model: str) -> dict[str, Score] | None:
    """By grader; None of a model that it does not ask, and until it has succeeded."""
    for told in evaluation.results["models"] if evaluation.results else ():
        if told["model"] == model:
            return {grader: Score.model_validate(grade) for grader, grade in told["grades"].items()}
    return None
