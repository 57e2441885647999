"""How far trackers have been told of a job. A follower claims a cursor, tells the tracker what comes next with no transaction
open, and moves the cursor once the tracker has it: whoever is killed between is followed by one that says the same again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, orm, select

from app.core import ids
from app.core.data_report import brief
from app.jobs import events, integrations, life
from app.models import Job, JobEvent, JobFollower

LEASE = timedelta(seconds=150)  # more than a tracker is ever waited for
RETRY_DELAYS = tuple(
    timedelta(seconds=seconds) for seconds in (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 28_800, 28_800)
)  # a day; after the last there is one more attempt, and then none
EVENTS_AT_ONCE = 1000
COUNTED = frozenset({"step", "total_steps", "tokens", "labelled_tokens", "tokens_left"})  # of the run, and no metric of it


@dataclass(frozen=True)
class Point:
    """What was measured at one step, at the time its first metric was written down."""

    step: int
    at: datetime
    metrics: dict[str, float]


@dataclass(frozen=True)
class Ending:
    """How a job ended. `error` is the message that its owner has been given."""

    state: str
    at: datetime
    summary: dict[str, Any]
    error: str | None


@dataclass(frozen=True)
class Run:
    """A job's run over there."""

    id: str
    url: str | None


@dataclass(frozen=True)
class Due:
    """What one tracker is to be told next of one job. `asked` is its part of the request; `run` is None before the first word."""

    follower_id: str
    claims: int
    failures: int
    job_id: str
    type: str
    asked: dict[str, Any]
    config: dict[str, Any]
    started_at: datetime
    run: Run | None
    step: int
    points: tuple[Point, ...]
    ending: Ending | None
    has_more: bool

    @property
    def is_empty(self) -> bool:
        return not self.points and self.ending is None


def begin(session: orm.Session, job: Job) -> None:
    """Have a new job followed, if its owner asked for a tracker."""
    session.add_all(
        JobFollower(
            id=ids.new("follow_"),
            organization_id=job.organization_id,
            project_id=job.project_id,
            job_id=job.id,
            type=asked["type"],
        )
        for asked in job.integrations or ()
        if asked["type"] in integrations.FOLLOWED
    )


def claim(session: orm.Session, type: str) -> Due | None:
    """The cursor of this type of tracker that has waited longest, from before every other relay; None when none is due."""
    follower = session.scalar(
        select(JobFollower)
        .where(JobFollower.type == type, JobFollower.next_attempt_at <= func.statement_timestamp())
        .order_by(JobFollower.next_attempt_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if follower is None:
        return None
    follower.claims += 1
    follower.next_attempt_at = func.clock_timestamp() + LEASE
    job = session.get_one(Job, follower.job_id)
    is_over = job.state in life.TERMINAL
    points, has_more = read(session, job.id, after=follower.step, is_over=is_over)
    return Due(
        follower_id=follower.id,
        claims=follower.claims,
        failures=follower.failures,
        job_id=job.id,
        type=type,
        asked=next(one[type] for one in job.integrations or () if one["type"] == type),
        config=config_of(job),
        started_at=job.started_at or job.created_at,
        run=Run(**follower.run) if follower.run else None,
        step=follower.step,
        points=tuple(points),
        ending=_ending(job) if is_over and not has_more else None,
        has_more=has_more,
    )


def read(
    session: orm.Session, job_id: str, *, after: int = -1, is_over: bool, limit: int | None = EVENTS_AT_ONCE
) -> tuple[Sequence[Point], bool]:
    """Points behind the step `after`, in order, and whether there may be more than were read.

    The same point comes out the same whenever it is read, or saying it again would say something else. So of a step that a
    resumed attempt repeated the first word counts; and the last step read stays back, since more may yet be said of it.
    """
    step = JobEvent.data["step"].as_integer()
    rows = session.execute(
        select(step.label("step"), JobEvent.data, JobEvent.created_at)
        .where(JobEvent.job_id == job_id, JobEvent.type == "metrics", step > after)
        .order_by(step, JobEvent.sequence)
        .limit(limit)
    ).all()
    has_more = len(rows) == limit
    points = list(_points(rows))
    return points if is_over and not has_more else points[:-1], has_more


def whole(session: orm.Session, job_id: str) -> tuple[Sequence[Point], dict[str, Any]]:
    """Every point of a job that has been trained to its end, and what its run is known by."""
    return read(session, job_id, is_over=True, limit=None)[0], config_of(session.get_one(Job, job_id))


def told(session: orm.Session, due: Due, run: Run | None, *, again_in: timedelta) -> None:
    """The tracker has it all. The first time, the job's owner is told of their run there."""
    follower = _held(session, due)
    if follower is None:
        return
    if run and follower.run is None:
        follower.run = asdict(run)
        message = f"Reporting to {integrations.SHOWN[due.type]}, run {run.id}" + (f": {run.url}" if run.url else "")
        _say(session, due, message, data={"integration": due.type, "run_id": run.id, "url": run.url})
    follower.failures = 0
    if due.points:
        follower.step = due.points[-1].step
    pause = timedelta() if due.has_more else again_in
    follower.next_attempt_at = None if due.ending else func.clock_timestamp() + pause


def failed(session: orm.Session, due: Due, *, reason: str) -> None:
    """The tracker was not told. It is tried again for a day; then the job's owner hears what it has not been told."""
    follower = _held(session, due)
    if follower is None:
        return
    follower.failures += 1
    if follower.failures <= len(RETRY_DELAYS):
        follower.next_attempt_at = func.clock_timestamp() + RETRY_DELAYS[follower.failures - 1]
        return
    follower.next_attempt_at = None
    what = "anything of this job" if follower.run is None else f"what came after step {follower.step}"
    shown = integrations.SHOWN[due.type]
    message = f"{shown} has not been told {what}: {reason}. It is not tried again; all of it is in the job's events"
    data = {"integration": due.type, "run_id": due.run and due.run.id, "last_step": max(0, follower.step)}
    _say(session, due, message, level="warn", data=data)


def config_of(job: Job) -> dict[str, Any]:
    """What the run is known by: what was asked, the spec as it was resolved, what the data counted."""
    plan, report = job.plan or {}, job.data_report or {}
    return {
        "job_id": job.id,
        "model": job.requested_model,
        "base_model": job.base,
        "method": job.request.get("method", "supervised"),
        "seed": job.seed,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "metadata": job.user_metadata or {},
        "spec": job.spec or {},
        "plan": {name: value for name, value in plan.items() if not isinstance(value, (dict, list))},
        "data": brief(report),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"spec": {"lora": {"rank": 8}}}` as `{"spec.lora.rank": "8"}`, without what is empty."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            found[prefix + name] = str(value)
    return found


def _points(rows: Iterable[Row[Any]]) -> Iterable[Point]:
    points: dict[int, Point] = {}
    for row in rows:
        point = points.setdefault(row.step, Point(row.step, row.created_at, {}))
        for name, value in row.data.items():
            if name not in COUNTED and isinstance(value, (int, float)):
                point.metrics.setdefault(name, float(value))
    return points.values()


def _ending(job: Job) -> Ending:
    summary = {"status": job.state, "fine_tuned_model": job.fine_tuned_model, "trained_tokens": job.trained_tokens}
    known = {name: value for name, value in summary.items() if value is not None}
    assert job.finished_at is not None
    return Ending(job.state, job.finished_at, known, job.error["message"] if job.error else None)


def _held(session: orm.Session, due: Due) -> JobFollower | None:
    """The cursor, locked, unless somebody has claimed it since."""
    mine = select(JobFollower).where(JobFollower.id == due.follower_id, JobFollower.claims == due.claims)
    return session.scalar(mine.where(JobFollower.next_attempt_at.is_not(None)).with_for_update())


def _say(session: orm.Session, due: Due, message: str, *, level: events.Level = "info", data: dict[str, Any]) -> None:
    job = session.scalars(select(Job).where(Job.id == due.job_id).with_for_update()).one()
    events.append(session, job, message, level=level, data=data)
