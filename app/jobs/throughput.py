"""How fast jobs have gone through this installation: what an estimate is made of. Nothing is assumed that was not measured."""

from sqlalchemy import delete, func, orm, select

from app.core import ids, methods
from app.models import Job, Throughput

REMEMBERED = 20  # finished jobs of a base and a queue


def record(session: orm.Session, job: Job) -> None:
    """Of a job that has succeeded: its tokens over the time that workers have had it, start, evaluation and upload included."""
    if not job.trained_tokens or not job.worker_seconds:
        return
    method = ((job.spec or {}).get("preference") or {}).get("method", "supervised")
    took = {"tokens": round(job.trained_tokens * methods.work(method)), "worker_seconds": job.worker_seconds}
    session.add(Throughput(id=ids.new("tp_"), queue=job.queue, base=job.base, **took))
    session.flush()
    mine = select(Throughput.id).where(Throughput.queue == job.queue, Throughput.base == job.base)
    too_old = mine.order_by(Throughput.id.desc()).offset(REMEMBERED)
    session.execute(delete(Throughput).where(Throughput.id.in_(too_old)))


def tokens_per_second(session: orm.Session, *, queue: str, base: str) -> float | None:
    """All tokens of the last few finished jobs over all their time, so that small ones, which mostly start, weigh little. Those
    of other methods count as many as supervised training would have done meanwhile.

    None where there is none.
    """
    speed = func.sum(Throughput.tokens) / func.sum(Throughput.worker_seconds)
    found = session.scalar(select(speed).where(Throughput.queue == queue, Throughput.base == base))
    return None if found is None else float(found)


def expected_seconds(session: orm.Session, job: Job) -> float | None:
    """What a prepared job is likely to take of a worker's time; None where nothing like it was measured."""
    speed = tokens_per_second(session, queue=job.queue, base=job.base)
    return job.total_tokens / speed if speed and job.total_tokens else None
