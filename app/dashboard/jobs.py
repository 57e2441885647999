"""What pages show of jobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core.spec import Requested, TrainSpec
from app.jobs import queue
from app.jobs.comparing import flat
from app.jobs.life import TERMINAL
from app.jobs.queue import Place
from app.jobs.schemas import status_of
from app.models import Adapter, Desired, Job, JobEvent, JobState
from app.models.jobs import UNFINISHED
from app.schemas import Failure

MONTH = timedelta(days=30)
# of a row that is one of many nobody reads what may be long
SHORT = tuple(
    orm.defer(column, raiseload=True) for column in (Job.spec, Job.datasets, Job.data_report, Job.held_out, Job.examined)
)


@dataclass(frozen=True)
class JobView:
    """One job, as rows and headers show it. `seconds_left` is null until it makes steps, `took_seconds` until it is over."""

    id: str
    name: str
    status: str
    paused: bool
    is_over: bool
    can_pause: bool
    is_pausing: bool
    took_seconds: float | None
    base: str
    method: str
    training_file: str
    validation_file: str | None
    seed: int
    step: int
    total_steps: int | None
    seconds_left: float | None
    place: int | None
    starts_at: datetime | None
    trained_tokens: int | None
    valid_loss: float | None
    error: Failure | None
    created_at: datetime

    @classmethod
    def of(cls, job: Job, place: Place | None, now: datetime) -> "JobView":
        """`now` is the database's, as all instants of a job are."""
        left = job.estimated_finish_at - now if job.estimated_finish_at and job.state == JobState.RUNNING else None
        return cls(
            id=job.id,
            name=job.suffix or job.fine_tuned_model or f"{job.base} · {job.id[-6:]}",
            status=status_of(job.state),
            paused=job.state == JobState.PAUSED,
            is_over=job.state in TERMINAL,
            can_pause=job.state in (JobState.QUEUED, JobState.RUNNING) and job.desired == Desired.RUN,
            is_pausing=job.state == JobState.RUNNING and job.desired == Desired.PAUSE,
            took_seconds=(job.finished_at - job.started_at).total_seconds() if job.finished_at and job.started_at else None,
            base=job.base,
            method=job.request.get("method", "supervised"),
            training_file=job.training_file_id,
            validation_file=job.validation_file_id,
            seed=job.seed,
            step=job.step,
            total_steps=(job.plan or {}).get("total_steps"),
            seconds_left=max(0.0, left.total_seconds()) if left else None,
            place=place.position if place else None,
            starts_at=place.starts_at if place else None,
            trained_tokens=job.trained_tokens,
            valid_loss=job.valid_loss,
            error=Failure.model_validate(job.error) if job.error else None,
            created_at=job.created_at,
        )


@dataclass(frozen=True)
class Month:
    succeeded: int
    failed: int
    tokens: int


@dataclass(frozen=True)
class Models:
    number: int
    bytes: int


@dataclass(frozen=True)
class Latest:
    """What was measured last."""

    train_loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Memory:
    """Peaks, in bytes."""

    planned: int | None
    measured: int | None


def views(session: orm.Session, jobs: Sequence[Job]) -> list[JobView]:
    places, now = queue.places(session, jobs), session.scalars(select(func.clock_timestamp())).one()
    return [JobView.of(job, places.get(job.id), now) for job in jobs]


def unfinished(session: orm.Session, caller: Caller, *, most: int) -> tuple[Sequence[Job], int]:
    """The first of them, and how many there are."""
    mine = (*_mine(caller), Job.state.in_(UNFINISHED))
    number = session.scalar(select(func.count()).select_from(Job).where(*mine)) or 0
    return session.scalars(select(Job).where(*mine).options(*SHORT).order_by(Job.id).limit(most)).all(), number


def last_month(session: orm.Session, caller: Caller) -> Month:
    recent = Job.finished_at > func.clock_timestamp() - MONTH
    succeeded, failed, tokens = session.execute(
        select(
            func.count().filter(Job.state == JobState.SUCCEEDED),
            func.count().filter(Job.state == JobState.FAILED),
            func.sum(Job.trained_tokens),
        ).where(*_mine(caller), recent)
    ).one()
    return Month(succeeded, failed, int(tokens or 0))


def models(session: orm.Session, caller: Caller) -> Models:
    mine = Adapter.organization_id == caller.organization_id, Adapter.project_id == caller.project_id, Adapter.step.is_(None)
    number, size = session.execute(select(func.count(), func.sum(Adapter.size_bytes)).where(*mine)).one()
    return Models(number, int(size or 0))


def latest(session: orm.Session, job: Job) -> Latest:
    """From the last events that tell of a training step and of an evaluation."""

    def last(name: str) -> dict[str, Any]:
        told = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "metrics", JobEvent.data.has_key(name))
        return session.scalar(told.order_by(JobEvent.sequence.desc()).limit(1)) or {}

    train, validation = last("train_loss"), last("valid_loss") if job.validation_file_id or _is_split(job) else {}
    return Latest(train.get("train_loss"), validation.get("valid_loss"), train.get("tokens_per_second"))


def asked(job: Job) -> dict[str, Any]:
    """What was not left to us, by dotted names."""
    usual = flat(Requested())
    return {name: value for name, value in flat(Requested.model_validate(job.request)).items() if value != usual.get(name)}


def chosen(job: Job) -> dict[str, Any]:
    """All that it trains with, by dotted names; nothing until its files have been looked at."""
    return flat(TrainSpec.model_validate(job.spec)) if job.spec else {}


def memory(job: Job) -> Memory:
    plan = job.plan or {}
    return Memory(plan.get("predicted_peak_bytes"), plan.get("measured_peak_bytes"))


def _is_split(job: Job) -> bool:
    return job.request.get("training", {}).get("validation_split") is not None


def _mine(caller: Caller) -> tuple[Any, ...]:
    return Job.organization_id == caller.organization_id, Job.project_id == caller.project_id
