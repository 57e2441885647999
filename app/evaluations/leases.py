"""Who may speak for an evaluation: a worker holds it by lease and attempt for a slice of its work. Time is the database's."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, orm, select, update
from sqlalchemy.dialects.postgresql import insert

from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import AppError
from app.core.settings import EvaluationSettings, LeaseSettings
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationCreate
from app.files import service as files
from app.inference.service import Whole
from app.models import Evaluation, EvaluationSample, EvaluationState, File, FileStatus
from app.models.evaluations import UNDECIDED

POSTPONED = timedelta(seconds=5)


class EvaluationLost(AppError):
    """Somebody else holds it now, or it was cancelled. Whoever gets this stops and writes nothing."""

    status, code = 409, "lease_lost"


@dataclass(frozen=True)
class Lease:
    """The right to speak for one attempt at an evaluation."""

    evaluation_id: str
    attempt: int
    owner: str


@dataclass(frozen=True)
class Claimed:
    """An evaluation in hand, its file valid and of a format that fits."""

    lease: Lease
    caller: Caller
    request: EvaluationCreate
    format: str
    storage_key: str
    sha256: str


def claim(session: orm.Session, *, owner: str, settings: LeaseSettings, limits: EvaluationSettings) -> Claimed | None:
    """The one that has waited longest since somebody worked on it. What cannot be evaluated fails here, with the reason."""
    row = session.execute(
        select(Evaluation, File)
        .join(File, File.id == Evaluation.file_id)
        .where(claimable(func.clock_timestamp()))
        .order_by(Evaluation.not_before, Evaluation.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Evaluation)
    ).one_or_none()
    if row is None:
        return None
    evaluation, file = row
    try:
        request = evaluations.request_of(evaluation)
        _count_death(evaluation, settings)
        files.require_valid(file, param="file")
        evaluations.require_possible(file, request, limits)
    except AppError as refused:
        _fail(evaluation, code=str(refused.code), message=str(refused), param=refused.param)
        session.flush()
        return claim(session, owner=owner, settings=settings, limits=limits)
    assert file.report is not None
    evaluation.attempt += 1
    evaluation.state, evaluation.rows = EvaluationState.RUNNING, file.report["rows"]
    evaluation.lease_owner, evaluation.lease_expires_at = owner, _in(settings.lease_seconds)
    if evaluation.started_at is None:
        evaluation.started_at = func.clock_timestamp()
    return Claimed(
        Lease(evaluation.id, evaluation.attempt, owner),
        _owner(evaluation),
        request,
        str(file.report["format"]),
        file.storage_key,
        file.sha256,
    )


def claimable(since: Any) -> ColumnElement[bool]:
    """Whether one waits for a worker, since this instant at the latest, or was left by one that has died."""
    is_let_go = or_(Evaluation.lease_expires_at.is_(None), Evaluation.lease_expires_at < since)
    read = select(File.id).where(File.id == Evaluation.file_id, File.status != FileStatus.UPLOADED)
    is_free = Evaluation.state.in_(UNDECIDED), Evaluation.not_before <= since, is_let_go
    return and_(*is_free, read.correlate(Evaluation).exists())


def holding(session: orm.Session, lease: Lease) -> Evaluation:
    """The evaluation, locked, if this attempt still owns it. Every word a worker says starts here. Raises EvaluationLost."""
    mine = select(Evaluation).where(
        Evaluation.id == lease.evaluation_id,
        Evaluation.attempt == lease.attempt,
        Evaluation.lease_owner == lease.owner,
        Evaluation.state == EvaluationState.RUNNING,
    )
    evaluation = session.scalar(mine.with_for_update().execution_options(populate_existing=True))
    if evaluation is None:
        raise EvaluationLost(f"attempt {lease.attempt} of {lease.evaluation_id} is no longer held by {lease.owner}")
    return evaluation


def extend(session: orm.Session, lease: Lease, *, settings: LeaseSettings) -> None:
    """The worker lives."""
    holding(session, lease).lease_expires_at = _in(settings.lease_seconds)


def record_answer(
    session: orm.Session,
    lease: Lease,
    *,
    position: int,
    line: int,
    model: str,
    answer: Whole | None,
    error: Mapping[str, str | None] | None = None,
) -> None:
    """Keep what a model answered, or why it could not be asked. Said twice is said once."""
    evaluation = holding(session, lease)
    values = {
        "id": ids.new("evalsample_"),
        "organization_id": evaluation.organization_id,
        "project_id": evaluation.project_id,
        "evaluation_id": evaluation.id,
        "position": position,
        "line": line,
        "model": model,
        "answer": answer and answer.text.replace("\x00", "\ufffd"),  # which Postgres does not store
        "finish_reason": answer and answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens if answer else 0,
        "completion_tokens": answer.completion_tokens if answer else 0,
        "error": error and dict(error),
        "grades": {} if error else None,
    }
    given = {name: value for name, value in values.items() if value is not None}  # None would be stored as JSON's null
    kept = insert(EvaluationSample).values(given).on_conflict_do_nothing().returning(EvaluationSample.id)
    if session.scalar(kept) is not None:
        evaluation.answered += 1
    _progressed(evaluation)


def record_grades(session: orm.Session, lease: Lease, *, position: int, grades: Mapping[str, Any]) -> None:
    _progressed(holding(session, lease))
    session.execute(update(EvaluationSample).where(*_at(lease, position)).values(grades=dict(grades)))


def record_verdict(session: orm.Session, lease: Lease, *, position: int, verdict: Mapping[str, Any]) -> None:
    _progressed(holding(session, lease))
    session.execute(update(EvaluationSample).where(*_at(lease, position)).values(verdict=dict(verdict)))


def rest(session: orm.Session, lease: Lease) -> None:
    """A slice is done and the work is not: whoever waits longer comes first now."""
    _let_go(holding(session, lease))


def wait(session: orm.Session, lease: Lease, *, reason: str) -> None:
    """What it needs is away. Nothing is counted against it, and its owner is told what it waits for."""
    evaluation = holding(session, lease)
    evaluation.status_details = reason
    _let_go(evaluation, POSTPONED)


def failed(session: orm.Session, lease: Lease, *, reason: str, settings: LeaseSettings) -> None:
    """The slice broke. Another may try shortly, unless too many have since the last answer that was kept."""
    evaluation = holding(session, lease)
    evaluation.failures += 1
    if evaluation.failures < settings.max_attempts:
        evaluation.status_details = reason
        _let_go(evaluation, POSTPONED * evaluation.failures)
    else:
        _fail(evaluation, code="evaluation_failed", message=f"the evaluation could not go on: {reason}", param=None)


def fail(session: orm.Session, lease: Lease, *, code: str, message: str, param: str | None) -> None:
    """It cannot succeed as it was asked: no retry."""
    _fail(holding(session, lease), code=code, message=message, param=param)


def finish(session: orm.Session, lease: Lease, *, results: dict[str, Any]) -> None:
    evaluation = holding(session, lease)
    evaluation.results = results
    evaluations.end(evaluation, EvaluationState.SUCCEEDED)


def _owner(evaluation: Evaluation) -> Caller:
    return Caller(
        evaluation.api_key_id,
        evaluation.organization_id,
        evaluation.project_id,
        evaluation.organization_slug,
        candidate_of=evaluation.job_id,
    )


def _count_death(evaluation: Evaluation, settings: LeaseSettings) -> None:
    """An expired lease is a worker that died with it. Raises AppError when too many have."""
    if evaluation.lease_owner is None:
        return
    evaluation.failures += 1
    if evaluation.failures >= settings.max_attempts:
        raise AppError("its workers have died again and again at the same answers", code="evaluation_failed")


def _progressed(evaluation: Evaluation) -> None:
    evaluation.failures, evaluation.status_details = 0, None


def _let_go(evaluation: Evaluation, pause: timedelta = timedelta()) -> None:
    evaluation.lease_owner = evaluation.lease_expires_at = None
    evaluation.not_before = func.clock_timestamp() + pause


def _fail(evaluation: Evaluation, *, code: str, message: str, param: str | None) -> None:
    evaluation.error = {"code": code, "message": message, "param": param}
    evaluations.end(evaluation, EvaluationState.FAILED)


def _at(lease: Lease, position: int) -> tuple[Any, ...]:
    return EvaluationSample.evaluation_id == lease.evaluation_id, EvaluationSample.position == position


def _in(seconds: float) -> Any:
    return func.clock_timestamp() + timedelta(seconds=seconds)
