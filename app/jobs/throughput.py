"""How fast jobs have gone through this installation: what an estimate is made of. Nothing is assumed that was not measured."""

from sqlalchemy import delete, func, orm, select

from app.core import ids
from app.models import Job, Throughput

REMEMBERED = 20  # finished jobs of a base and a queue


def record(session: orm.Session, job: Job) -> None:
    """Of a job that has succeeded: its tokens over the time that workers have had it, start, evaluation and upload included."""
    if not job.trained_tokens or not job.worker_seconds:
        return
    speed = job.trained_tokens / job.worker_seconds
    session.add(Throughput(id=ids.new("tp_"), queue=job.queue, base=job.base, tokens_per_second=speed))
    session.flush()
    mine = select(Throughput.id).where(Throughput.queue == job.queue, Throughput.base == job.base)
    too_old = mine.order_by(Throughput.id.desc()).offset(REMEMBERED)
    session.execute(delete(Throughput).where(Throughput.id.in_(too_old)))


def tokens_per_second(session: orm.Session, *, queue: str, base: str) -> float | None:
    """The median of the last few finished jobs; None where there is none."""
    median = func.percentile_cont(0.5).within_group(Throughput.tokens_per_second)
    found = session.scalar(select(median).where(Throughput.queue == queue, Throughput.base == base))
    return None if found is None else float(found)


def expected_seconds(session: orm.Session, job: Job) -> float | None:
    """What a prepared job is likely to take of a worker's time; None where nothing like it was measured."""
    speed = tokens_per_second(session, queue=job.queue, base=job.base)
    return job.total_tokens / speed if speed and job.total_tokens else None
