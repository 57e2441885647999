"""What of a job's checkpoints is kept: every adapter, as a model; the training state beside it while a resume may need it."""

from collections.abc import Collection, Sequence

from sqlalchemy import orm, select

from app import outbox
from app.core import checkpoints
from app.models import Job, JobCheckpoint


def resumable(session: orm.Session, job: Job) -> Sequence[JobCheckpoint]:
    """Those that a new attempt can go on from, the newest first: the others are there in case it is damaged."""
    mine = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.has_state)
    return session.scalars(mine.order_by(JobCheckpoint.step.desc())).all()


def drop_older_states(session: orm.Session, job: Job, *, newest: int) -> None:
    """Now that the job has the checkpoint of step `newest`."""
    metrics = {checkpoint.step: checkpoint.metrics for checkpoint in resumable(session, job)}
    drop_states(session, job, but=checkpoints.kept(metrics, newest=newest))


def drop_states(session: orm.Session, job: Job, *, but: Collection[int] = ()) -> None:
    """Nobody goes on from these any more. Their bytes are deleted after the commit."""
    for checkpoint in resumable(session, job):
        if checkpoint.step not in but:
            checkpoint.has_state = False
            outbox.put(session, outbox.Topic.PURGE, {"prefix": f"{checkpoint.prefix}/state/"})
