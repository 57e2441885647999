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
from app.core.events import DISK_FULL, Event, MeasuredMemory, Started, Stepped
from app.core.manifest import Manifest
from app.core.settings import LeaseSettings
from app.files import service as files
from app.files.service import Result
from app.jobs import checkpoints, events, gates, life, states, throughput, turns
from app.jobs.life import Life
from app.jobs.schemas import CheckpointOut
from app.models import Desired, Job, JobCheckpoint, JobState
from app.webhooks.emit import EventType

FULL_DISK_SECONDS = 60.0  # somebody has to free space first


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
    after = life.claimed(states.life_of(job))
    job.lease_owner = owner
    job.lease_expires_at = _in(settings.lease_seconds)
    job.words = 0
    if job.started_at is None:
        job.started_at = func.clock_timestamp()
    again = "" if after.attempt == 1 else f" (attempt {after.attempt})"
    states.become(session, job, after, f"A worker has taken the job{again}")
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
    words_before: int | None = None,
) -> Desired:
    """Extend the lease, record what the engine said since the last one, and hear what the owner wants.

    `words_before` counts what this attempt has said before: a commit whose answer was lost has recorded some of `said` already.
    """
    job = holding(session, lease)
    if words_before is not None:
        said = said[job.words - words_before :]
    job.words += len(said)
    job.lease_expires_at = _in(settings.lease_seconds)
    if seconds_left is not None:
        job.estimated_finish_at = _in(seconds_left)
    for event in said:
        match event:
            case Started():
                states.keep(job, life.stepped(states.life_of(job), event.resumed_from))
            case Stepped():
                states.keep(job, life.stepped(states.life_of(job), event.step))
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
    states.keep(job, life.checkpointed(states.life_of(job)))
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
    states.announce(session, job, EventType.CHECKPOINT, data_id=made.id, describe=lambda: CheckpointOut.of(made))


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
    """The job is trained: its model, its result files and its webhooks appear in this one transaction.

    With a quality gate the model is not live before that is passed, and the job has not succeeded.

    A cancel that came first wins: then the job is cancelled and nothing is published.
    """
    job = holding(session, lease)
    after = life.completed(states.life_of(job), has_gate=job.quality_gate is not None)
    if after.state == JobState.CANCELLED:
        states.become(session, job, after, states.CANCELLED)
        return
    job.trained_tokens, job.valid_loss = trained_tokens, manifest.metrics.get("valid_loss")
    job.plan = {**(job.plan or {}), "measured_peak_bytes": memory.peak_bytes, "measured": memory.model_dump(mode="json")}
    job.result_file_id, *job.further_result_file_ids = [files.add_result(session, job, table).id for table in tables]
    gates.trained(session, job, prefix=prefix, manifest=manifest)
    throughput.record(session, job)


def fail(session: orm.Session, lease: Lease, *, code: str, message: str, param: str | None = None) -> None:
    """The job cannot succeed as it was asked: no retry."""
    job = holding(session, lease)
    states.fail(session, job, code=code, message=message, param=param)


def release(
    session: orm.Session, lease: Lease, *, reason: str, code: str | None = None, is_death: bool = False, settings: LeaseSettings
) -> None:
    """This attempt is over and the job is not: wait a little, then let another worker take it, unless too many have failed.

    `code` goes with the event; a full disk is waited for longer. `is_death` as in `life.broken`.
    """
    _give_back(session, holding(session, lease), reason=reason, code=code, is_death=is_death, settings=settings)


def stop(session: orm.Session, lease: Lease) -> None:
    """The attempt has ended because it was told to, and what it had to keep is kept. Nothing is counted against the job."""
    job = holding(session, lease)
    drained = "The worker is going down; the job goes on elsewhere from its last checkpoint"
    _end_attempt(session, job, life.stopped(states.life_of(job)), drained)


def reap(session: orm.Session, *, settings: LeaseSettings) -> int:
    """Take jobs away from workers that have fallen silent. Returns how many."""
    silent = session.scalars(
        select(Job)
        .where(Job.state == JobState.RUNNING, Job.lease_expires_at < func.clock_timestamp())
        .with_for_update(skip_locked=True)
    ).all()
    for job in silent:
        _give_back(session, job, reason="Its worker has fallen silent", is_death=True, settings=settings)
    return len(silent)


def _held_by(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    return (Job.id == lease.job_id, Job.attempt == lease.attempt, Job.lease_owner == lease.owner, Job.state == JobState.RUNNING)


def _lost(lease: Lease) -> str:
    return f"attempt {lease.attempt} of job {lease.job_id} is no longer held by {lease.owner}"


def _give_back(
    session: orm.Session, job: Job, *, reason: str, code: str | None = None, is_death: bool, settings: LeaseSettings
) -> None:
    broken = life.broken(states.life_of(job), is_death=is_death, settings=settings)
    if broken.error_code is not None:
        states.keep(job, broken.after)
        states.fail(session, job, code=broken.error_code, message=_given_up(broken, reason), param=None)
        return
    if broken.after.state == JobState.QUEUED:
        job.not_before = _in(max(broken.wait_seconds, FULL_DISK_SECONDS) if code == DISK_FULL else broken.wait_seconds)
    data = {"code": code} if code else None
    _end_attempt(session, job, broken.after, f"{reason}; the job goes on from its last checkpoint", level="warn", data=data)


def _given_up(broken: life.Broken, reason: str) -> str:
    after = broken.after
    if broken.error_code == life.POISON:
        return (
            f"{reason}; given up after {after.deaths} attempts that all died after step {after.died_at_step}: what comes next "
            "brings them down. Nothing was charged; look at the longest rows, or lower max_seq_length, and create the job again"
        )
    return (
        f"{reason}; given up after {after.failures} attempts without a new checkpoint. Nothing was charged; create the job again"
    )


def _end_attempt(
    session: orm.Session,
    job: Job,
    after: Life,
    requeued: str,
    *,
    level: events.Level = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """The job leaves its worker as its owner wants it, or goes back to the queue, of which `requeued` tells."""
    match after.state:
        case JobState.CANCELLED:
            states.become(session, job, after, states.CANCELLED)
        case JobState.PAUSED:
            states.become(session, job, after, states.PAUSED)
        case _:
            states.become(session, job, after, requeued, level=level, data=data)
            outbox.ring(session, job.queue)


def _in(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() + timedelta(seconds=seconds)
