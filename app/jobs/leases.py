"""Who may speak for a running job. A worker holds it by lease and attempt; time is the database's."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, orm, select

from app import outbox
from app.adapters import service as adapters
from app.core import ids
from app.core.errors import AppError
from app.core.events import DISK_FULL, Event, MeasuredMemory
from app.core.manifest import Manifest
from app.core.settings import LeaseSettings
from app.files import service as files
from app.files.service import Result
from app.jobs import checkpoints, events, states, throughput, turns
from app.models import Desired, Job, JobCheckpoint, JobState
from app.webhooks.emit import EventType

BACKOFF_SECONDS = 5.0
FULL_DISK_BACKOFF_SECONDS = 60.0  # somebody has to free space first


class LeaseLost(AppError):
    """Somebody else holds the job now, or nobody does. Whoever gets this stops and writes nothing."""

    status, code = 409, "lease_lost"


@dataclass(frozen=True)
class Lease:
    """The right to speak for one attempt of one job."""

    job_id: str
    attempt: int
    owner: str


def claim(session: orm.Session, queue: str, *, owner: str, settings: LeaseSettings) -> Lease | None:
    """Take the job whose turn it is in this queue; None when none waits."""
    job = turns.take(session, queue)
    if job is None:
        return None
    job.attempt += 1
    job.lease_owner = owner
    job.lease_expires_at = _in(settings.lease_seconds)
    if job.started_at is None:
        job.started_at = func.clock_timestamp()
    again = "" if job.attempt == 1 else f" (attempt {job.attempt})"
    states.move(session, job, JobState.RUNNING, f"A worker has taken the job{again}")
    return Lease(job.id, job.attempt, owner)


def holding(session: orm.Session, lease: Lease) -> Job:
    """The job, locked, if this attempt still owns it. Every word a worker says starts here. Raises LeaseLost."""
    mine = select(Job).where(*_held_by(lease)).with_for_update()
    job = session.scalar(mine.execution_options(populate_existing=True))  # else a cached row answers for the locked one
    if job is None:
        raise LeaseLost(_lost(lease))
    return job


def heartbeat(
    session: orm.Session,
    lease: Lease,
    said: list[Event],
    *,
    settings: LeaseSettings,
    seconds_left: float | None = None,
) -> Desired:
    """Extend the lease, record what the engine said since the last one, and hear what the owner wants."""
    job = holding(session, lease)
    job.lease_expires_at = _in(settings.lease_seconds)
    if seconds_left is not None:
        job.estimated_finish_at = _in(seconds_left)
    for event in said:
        events.record(session, job, event)
    return Desired(job.desired)


def desired(session: orm.Session, lease: Lease) -> Desired:
    """What the owner wants, without a word and without a lock. Raises LeaseLost."""
    found = session.scalar(select(Job.desired).where(*_held_by(lease)))
    if found is None:
        raise LeaseLost(_lost(lease))
    return Desired(found)


def checkpoint(
    session: orm.Session, lease: Lease, *, step: int, prefix: str, manifest: Manifest, metrics: dict[str, Any]
) -> None:
    """Make a checkpoint known. All of its bytes are in storage and verified before this is called.

    An attempt that comes by a step which has one did not go on from it, because it was damaged: this one takes its name.
    """
    job = holding(session, lease)
    known = session.scalar(select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.step == step))
    if known is not None and known.attempt == lease.attempt:
        return  # said twice
    if known is not None:
        _replace(session, known, lease, prefix=prefix, manifest=manifest, metrics=metrics)
    else:
        _add(session, job, lease, step=step, prefix=prefix, manifest=manifest, metrics=metrics)
    checkpoints.drop_older_states(session, job, newest=step)


def _add(
    session: orm.Session, job: Job, lease: Lease, *, step: int, prefix: str, manifest: Manifest, metrics: dict[str, Any]
) -> None:
    name = adapters.name_of(job, step=step)
    made = JobCheckpoint(
        id=ids.new("ftckpt_"),
        organization_id=job.organization_id,
        project_id=job.project_id,
        job_id=job.id,
        step=step,
        attempt=lease.attempt,
        prefix=prefix,
        metrics=metrics,
        fine_tuned_model=name,
    )
    session.add(made)
    adapters.publish(session, job, name=name, step=step, prefix=f"{prefix}/adapter", manifest=manifest)
    events.append(session, job, f"Checkpoint saved at step {step}: {name}")
    states.announce(session, job, EventType.CHECKPOINT, data_id=made.id)


def _replace(
    session: orm.Session, known: JobCheckpoint, lease: Lease, *, prefix: str, manifest: Manifest, metrics: dict[str, Any]
) -> None:
    outbox.put(session, outbox.Topic.PURGE, {"prefix": f"{known.prefix}/"})
    known.attempt, known.prefix, known.metrics, known.has_state = lease.attempt, prefix, metrics, True
    adapters.move(session, known.fine_tuned_model, prefix=f"{prefix}/adapter", manifest=manifest)


def resumable_checkpoints(session: orm.Session, lease: Lease) -> Sequence[JobCheckpoint]:
    """Where a new attempt goes on from: the first of these that is whole."""
    return checkpoints.resumable(session, holding(session, lease))


def complete(
    session: orm.Session,
    lease: Lease,
    *,
    prefix: str,
    manifest: Manifest,
    trained_tokens: int,
    memory: MeasuredMemory,
    tables: Sequence[Result],
) -> None:
    """The job has succeeded: its model, its result files and its webhooks appear in this one transaction.

    A cancel that came first wins: then the job is cancelled and nothing is published.
    """
    job = holding(session, lease)
    if job.desired == Desired.CANCEL:
        states.move(session, job, JobState.CANCELLED, "The job was cancelled")
        return
    job.fine_tuned_model = adapters.name_of(job)
    job.trained_tokens, job.valid_loss = trained_tokens, manifest.metrics.get("valid_loss")
    job.plan = {**(job.plan or {}), "measured_peak_bytes": memory.peak_bytes, "measured": memory.model_dump(mode="json")}
    job.result_file_id, *job.further_result_file_ids = [files.add_result(session, job, table).id for table in tables]
    adapter = adapters.publish(session, job, name=job.fine_tuned_model, step=None, prefix=prefix, manifest=manifest)
    events.append(session, job, f"New fine-tuned model created: {job.fine_tuned_model}")
    states.move(session, job, JobState.SUCCEEDED, "The job has successfully completed")
    throughput.record(session, job)
    outbox.put(session, outbox.Topic.PREFETCH, adapters.ref_of(adapter).model_dump(mode="json"))


def fail(session: orm.Session, lease: Lease, *, code: str, message: str, param: str | None = None) -> None:
    """The job cannot succeed as it was asked: no retry."""
    job = holding(session, lease)
    _fail(session, job, code=code, message=message, param=param)


def release(session: orm.Session, lease: Lease, *, reason: str, code: str | None = None, settings: LeaseSettings) -> None:
    """This attempt is over and the job is not: wait a little, then let another worker take it, unless too many have failed.

    `code` goes with the event; a full disk is waited for longer.
    """
    _give_back(session, holding(session, lease), reason=reason, code=code, settings=settings)


def stop(session: orm.Session, lease: Lease) -> None:
    """The attempt has ended because it was told to, and what it had to keep is kept. Nothing is counted against the job."""
    job = holding(session, lease)
    if not _as_desired(session, job):
        _requeue(session, job, "The worker is going down; the job goes on elsewhere from its last checkpoint")


def reap(session: orm.Session, *, settings: LeaseSettings) -> int:
    """Take jobs away from workers that have fallen silent. Returns how many."""
    silent = session.scalars(
        select(Job)
        .where(Job.state == JobState.RUNNING, Job.lease_expires_at < func.clock_timestamp())
        .with_for_update(skip_locked=True)
    ).all()
    for job in silent:
        _give_back(session, job, reason="Its worker has fallen silent", settings=settings)
    return len(silent)


def _held_by(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == lease.job_id, Job.attempt == lease.attempt, Job.lease_owner == lease.owner, Job.state == JobState.RUNNING)


def _lost(lease: Lease) -> str:
    return f"attempt {lease.attempt} of job {lease.job_id} is no longer held by {lease.owner}"


def _give_back(session: orm.Session, job: Job, *, reason: str, code: str | None = None, settings: LeaseSettings) -> None:
    """A broken attempt of a job that its owner has cancelled or paused is what they wanted."""
    if _as_desired(session, job):
        return
    job.failures += 1
    if job.failures >= settings.max_attempts:
        message = f"{reason}; given up after {job.failures} attempts. Nothing was charged; create the job again"
        _fail(session, job, code="infra_exhausted", message=message, param=None)
        return
    backoff_seconds = FULL_DISK_BACKOFF_SECONDS if code == DISK_FULL else BACKOFF_SECONDS
    job.not_before = _in(backoff_seconds * 2 ** (job.failures - 1))
    data = {"code": code} if code else None
    _requeue(session, job, f"{reason}; the job goes on from its last checkpoint", level="warn", data=data)


def _as_desired(session: orm.Session, job: Job) -> bool:
    """Whether its owner wants it to run no longer, which it then does not."""
    match Desired(job.desired):
        case Desired.CANCEL:
            states.move(session, job, JobState.CANCELLED, "The job was cancelled")
        case Desired.PAUSE:
            states.move(session, job, JobState.PAUSED, states.PAUSED)
        case Desired.RUN:
            return False
    return True


def _requeue(
    session: orm.Session, job: Job, message: str, *, level: events.Level = "info", data: dict[str, Any] | None = None
) -> None:
    states.move(session, job, JobState.QUEUED, message, level=level, data=data)
    outbox.ring(session, job.queue)


def _fail(session: orm.Session, job: Job, *, code: str, message: str, param: str | None) -> None:
    job.error = {"code": code, "message": message, "param": param}
    states.move(session, job, JobState.FAILED, message, level="error", data=job.error)


def _in(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() + timedelta(seconds=seconds)
