"""What app.jobs.life decides is done to rows here: row, event and messages together."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import func, orm

from app import outbox
from app.jobs import checkpoints, events, life, turns
from app.jobs.life import TERMINAL, Life
from app.jobs.schemas import JobOut
from app.models import Desired, Job, JobState
from app.webhooks import emit
from app.webhooks.emit import EventType

S = JobState

PAUSED = "The job was paused"  # from wherever it was
CANCELLED = "The job was cancelled"
TIDY_AFTER = timedelta(minutes=10)

_WEBHOOKS = {
    S.VALIDATING_FILES: EventType.CREATED,
    S.RUNNING: EventType.STARTED,
    S.SUCCEEDED: EventType.SUCCEEDED,
    S.FAILED: EventType.FAILED,
    S.CANCELLED: EventType.CANCELLED,
    S.PAUSED: EventType.PAUSED,
}


def life_of(job: Job) -> Life:
    return Life(
        id=job.id,
        state=JobState(job.state),
        desired=Desired(job.desired),
        attempt=job.attempt,
        failures=job.failures,
        step=job.step,
        attempt_step=job.attempt_step,
        died_at_step=job.died_at_step,
        deaths=job.deaths,
    )


def keep(job: Job, after: Life) -> None:
    """All of a life but its state, which `move` changes, and tells."""
    job.desired, job.attempt, job.failures = after.desired, after.attempt, after.failures
    job.step, job.attempt_step = after.step, after.attempt_step
    job.died_at_step, job.deaths = after.died_at_step, after.deaths


def become(
    session: orm.Session,
    job: Job,
    after: Life,
    message: str,
    *,
    level: events.Level = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Do to a locked row what was decided of its life; `message` tells of a change of state, if it is one."""
    keep(job, after)
    if after.state != job.state:
        move(session, job, after.state, message, level=level, data=data)


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
    life.moved(life_of(job), to)
    if job.state == S.RUNNING:
        turns.settle(session, job)
    job.state = to
    if to is not S.RUNNING:
        job.lease_owner = job.lease_expires_at = job.estimated_finish_at = None
    if to in TERMINAL:
        job.finished_at = func.clock_timestamp()
        checkpoints.drop_states(session, job)
        # what attempts that died have left in storage; one that is not dead yet has heard by then that it lost the job
        outbox.put(session, outbox.Topic.TIDY, {"prefix": prefix_of(job)}, after=TIDY_AFTER)
    session.flush()
    _tell(session, job, message, level=level, data=data)


def prefix_of(job: Job) -> str:
    """Where in storage its attempts leave what they make."""
    return f"orgs/{job.organization_id}/jobs/{job.id}/"


def fail(session: orm.Session, job: Job, *, code: str, message: str, param: str | None) -> None:
    """The end of a locked job that comes to nothing, with the reason for its owner."""
    job.error = {"code": code, "message": message, "param": param}
    move(session, job, S.FAILED, message, level="error", data=job.error)


def _tell(session: orm.Session, job: Job, message: str, *, level: events.Level, data: dict[str, Any] | None) -> None:
    events.append(session, job, message, level=level, data=data)
    if event_type := _WEBHOOKS.get(JobState(job.state)):
        announce(session, job, event_type, data_id=job.id, describe=lambda: JobOut.of(job, is_listed=True))


def announce(session: orm.Session, job: Job, event_type: EventType, *, data_id: str, describe: Callable[[], BaseModel]) -> None:
    """Tell the project's webhook endpoints. `describe` shows what the event is about as the API does."""
    owner = {"organization_id": job.organization_id, "project_id": job.project_id}
    emit.emit(session, **owner, type=event_type, data_id=data_id, describe=describe, trace=job.trace)
