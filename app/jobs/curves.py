"""A job's curves, with as many points as a screen can show: long ones are drawn together where they are kept, in Postgres."""

from typing import Any

from pydantic import BaseModel
from sqlalchemy import BigInteger, Float, Integer, cast, func, orm, select
from sqlalchemy.dialects.postgresql import distinct_on

from app.accounts.caller import Caller
from app.jobs import service as jobs
from app.models import JobEvent


class TrainPoint(BaseModel):
    """Of the steps from the one before up to `step`: means, and how far `loss` went down and up between."""

    step: int
    loss: float
    low: float
    high: float
    learning_rate: float
    tokens_per_second: float


class ValidationPoint(BaseModel):
    step: int
    loss: float


class CurvesOut(BaseModel):
    """What is told after `last_event_id` is not in it yet."""

    train: list[TrainPoint]
    validation: list[ValidationPoint]
    last_event_id: str | None


def of_job(session: orm.Session, caller: Caller, job_id: str, *, points: int) -> CurvesOut:
    """At most about `points` of training. A step that a resumed attempt repeated counts as it came out the last time."""
    job = jobs.get(session, caller, job_id)
    last = session.scalar(
        select(JobEvent.id).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence.desc()).limit(1)
    )  # before the curves are read: what comes in between is told twice, and never left out
    validation = [ValidationPoint(step=one.step, loss=_short(one.loss)) for one in validation_of(session, job.id)]
    return CurvesOut(train=_train(session, job.id, points), validation=validation, last_event_id=last)


def _measured(name: str) -> Any:
    return cast(JobEvent.data[name].astext, Float)


def _train(session: orm.Session, job_id: str, points: int) -> list[TrainPoint]:
    step = cast(JobEvent.data["step"].astext, Integer)
    mine = JobEvent.job_id == job_id, JobEvent.type == "metrics", JobEvent.data.has_key("train_loss")
    told = (
        select(
            step.label("step"),
            _measured("train_loss").label("loss"),
            _measured("learning_rate").label("learning_rate"),
            _measured("tokens_per_second").label("speed"),
        )
        .where(*mine)
        .ext(distinct_on(step))
        .order_by(step, JobEvent.sequence.desc())
        .cte()
    )
    steps = select(func.max(told.c.step) + 1).scalar_subquery()
    numbered = select(told, (cast(told.c.step, BigInteger) * points // steps).label("part")).cte()
    drawn = select(
        func.max(numbered.c.step),
        func.avg(numbered.c.loss),
        func.min(numbered.c.loss),
        func.max(numbered.c.loss),
        func.avg(numbered.c.learning_rate),
        func.avg(numbered.c.speed),
    ).group_by(numbered.c.part)
    names = ("loss", "low", "high", "learning_rate", "tokens_per_second")
    rows = session.execute(drawn.order_by(func.max(numbered.c.step)))
    return [TrainPoint(step=step, **dict(zip(names, map(_short, numbers), strict=True))) for step, *numbers in rows]


def validation_of(session: orm.Session, job_id: str) -> list[ValidationPoint]:
    """In the order of steps; one that was repeated as it came out the last time."""
    mine = JobEvent.job_id == job_id, JobEvent.type == "metrics", JobEvent.data.has_key("valid_loss")
    found = session.scalars(select(JobEvent.data).where(*mine).order_by(JobEvent.sequence))
    losses = {data["step"]: data["valid_loss"] for data in found if data}
    return [ValidationPoint(step=step, loss=losses[step]) for step in sorted(losses)]


def _short(value: float) -> float:
    """With as many digits as a chart can show: all of them would be most of the answer."""
    return float(f"{value:.6g}")
