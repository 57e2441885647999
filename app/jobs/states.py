"""Where a job may go. Legal moves are a table; one function makes a move: row, event and messages together."""

from typing import Any

from sqlalchemy import func, orm

from app.core.errors import Conflict
from app.jobs import checkpoints, events, turns
from app.models import Job, JobState
from app.webhooks import emit
from app.webhooks.emit import EventType

S = JobState

MOVES: dict[JobState, frozenset[JobState]] = {
    S.VALIDATING_FILES: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.CANCELLED}),
    # QUEUED: its worker died or drains
    S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED, S.PAUSED, S.QUEUED, S.EVALUATING}),
    S.EVALUATING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}
TERMINAL = frozenset(state for state, nexts in MOVES.items() if not nexts)

PAUSED = "The job was paused"  # from wherever it was

_WEBHOOKS = {
    S.VALIDATING_FILES: EventType.CREATED,
    S.RUNNING: EventType.STARTED,
    S.SUCCEEDED: EventType.SUCCEEDED,
    S.FAILED: EventType.FAILED,
    S.CANCELLED: EventType.CANCELLED,
    S.PAUSED: EventType.PAUSED,
}


class IllegalMove(Conflict):
    code = "illegal_state"


def begin(session: orm.Session, job: Job, message: str) -> None:
    """The move from nothing: a new row, its first event, its first webhook."""
    job.state = S.VALIDATING_FILES
    session.add(job)
    session.flush()
    _tell(session, job, message, level="info", data=None)


def move(
    session: orm.Session,
    job: Job,
    to: JobState,
    message: str,
    *,
    level: events.Level = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Change the state of a locked row. The lease goes with the RUNNING state. Raises IllegalMove."""
    if to not in MOVES[JobState(job.state)]:
        raise IllegalMove(f"job {job.id} is {job.state} and cannot become {to}")
    if job.state == S.RUNNING:
        turns.settle(session, job)
    job.state = to
    if to is not S.RUNNING:
        job.lease_owner = job.lease_expires_at = job.estimated_finish_at = None
    if to in TERMINAL:
        job.finished_at = func.clock_timestamp()
        checkpoints.drop_states(session, job)
    session.flush()
    _tell(session, job, message, level=level, data=data)


def fail(session: orm.Session, job: Job, *, code: str, message: str, param: str | None) -> None:
    """The end of a locked job that comes to nothing, with the reason for its owner."""
    job.error = {"code": code, "message": message, "param": param}
    move(session, job, S.FAILED, message, level="error", data=job.error)


def _tell(session: orm.Session, job: Job, message: str, *, level: events.Level, data: dict[str, Any] | None) -> None:
    events.append(session, job, message, level=level, data=data)
    if event_type := _WEBHOOKS.get(JobState(job.state)):
        announce(session, job, event_type, data_id=job.id)


def announce(session: orm.Session, job: Job, event_type: EventType, *, data_id: str) -> None:
    """Tell the project's webhook endpoints."""
    emit.emit(session, organization_id=job.organization_id, project_id=job.project_id, type=event_type, data_id=data_id)
