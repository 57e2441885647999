"""Between a job's creation and its queue: its files are validated, its data tokenised, its settings resolved."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import ColumnElement, and_, func, orm, select

from app import outbox
from app.core import spec
from app.core.data_report import DataReport
from app.core.errors import Conflict
from app.core.settings import LeaseSettings
from app.files import service as files
from app.jobs import events, life, states
from app.jobs.admission import Admission
from app.models import File, FileStatus, Job, JobState

POSTPONED = timedelta(seconds=5)


@dataclass(frozen=True)
class SourceFile:
    """A file's bytes in storage."""

    storage_key: str
    sha256: str


@dataclass(frozen=True)
class ToPrepare:
    """A job whose files are valid, in the hands of one preparer for so many seconds."""

    id: str
    organization_id: str
    queue: str
    base: str
    seed: int
    requested: spec.Requested
    training_file: SourceFile
    validation_file: SourceFile | None
    seconds: float
    trace: str | None = None


class Dataset(BaseModel):
    """A tokenised file in storage. `sha256` is that of the stored bytes."""

    model_config = ConfigDict(frozen=True)

    key: str
    sha256: str


class Datasets(BaseModel):
    """What the trainer reads."""

    model_config = ConfigDict(frozen=True)

    training: Dataset
    validation: Dataset | None = None


def claim(session: orm.Session, *, lease_seconds: float = 60.0) -> ToPrepare | None:
    """The oldest job whose files have been validated. One whose file turned out bad fails here, with the reason."""
    validation = orm.aliased(File)
    row = session.execute(
        select(Job, File, validation)
        .join(File, File.id == Job.training_file_id)
        .outerjoin(validation, validation.id == Job.validation_file_id)
        .where(claimable(func.clock_timestamp()))
        .order_by(Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    ).one_or_none()
    if row is None:
        return None
    job, training_file, validation_file = row
    job.not_before = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    requested = spec.Requested.model_validate(job.request)
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        try:
            if file is not None:
                files.require_trainable(file, requested.method, param=param)
        except Conflict as refused:
            states.fail(session, job, code=str(refused.code), message=str(refused), param=param)
            return claim(session, lease_seconds=lease_seconds)
    return ToPrepare(
        id=job.id,
        organization_id=job.organization_id,
        queue=job.queue,
        base=job.base,
        seed=job.seed,
        requested=requested,
        training_file=SourceFile(training_file.storage_key, training_file.sha256),
        validation_file=SourceFile(validation_file.storage_key, validation_file.sha256) if validation_file else None,
        seconds=files.time_to_read(training_file, validation_file).total_seconds(),
        trace=job.trace,
    )


def claimable(since: Any) -> ColumnElement[bool]:
    """Whether a job waits, since this instant at the latest, for somebody to prepare it: its files have been validated."""
    unread = select(File.id).where(
        File.id.in_((Job.training_file_id, Job.validation_file_id)), File.status == FileStatus.UPLOADED
    )
    return and_(Job.state == JobState.VALIDATING_FILES, Job.not_before <= since, ~unread.correlate(Job).exists())


def hold(session: orm.Session, job_id: str, *, lease_seconds: float) -> None:
    """Whoever prepares it works on it still."""
    if job := _validating(session, job_id):
        job.not_before = func.clock_timestamp() + timedelta(seconds=lease_seconds)


def finish(
    session: orm.Session,
    job_id: str,
    *,
    admitted: Admission,
    datasets: Datasets,
    report: DataReport | None = None,
    reused: Sequence[str] = (),
) -> None:
    """Let the workers of its tier have it. A job that was cancelled meanwhile stays so."""
    job = _validating(session, job_id)
    if job is None:
        return
    job.spec = admitted.spec.model_dump(mode="json")
    job.plan = plan = admitted.shown()
    job.datasets = datasets.model_dump(mode="json")
    job.data_report = report.model_dump(mode="json") if report else None
    job.queue, job.total_tokens = admitted.queue, admitted.work_tokens
    job.queued_at = job.not_before = func.clock_timestamp()
    if reused:
        message = f"Tokenised before, and used again: {' and '.join(reused)}"
        events.append(session, job, message, data={"reused": list(reused)})
    for warning in report.warnings() if report else ():
        events.append(session, job, warning, level="warn")
    after = life.prepared(states.life_of(job))
    states.move(session, job, JobState.QUEUED, "Files validated, moving job to queued state", data=plan)
    states.become(session, job, after, states.PAUSED)
    if after.state == JobState.QUEUED:
        outbox.ring(session, job.queue)


def reject(session: orm.Session, job_id: str, *, code: str, message: str, param: str) -> None:
    """The data cannot be trained on with this base and these settings."""
    if job := _validating(session, job_id):
        states.fail(session, job, code=code, message=message, param=param)


def postpone(session: orm.Session, job_id: str, *, by: timedelta = POSTPONED) -> None:
    """Whoever had it in hand could not go on; another may try shortly."""
    if job := _validating(session, job_id):
        job.not_before = func.clock_timestamp() + by


def failed(session: orm.Session, job_id: str, *, reason: str, settings: LeaseSettings) -> None:
    """Another may try shortly, unless too many have."""
    job = _validating(session, job_id)
    if job is None:
        return
    job.failures += 1
    if job.failures < settings.max_attempts:
        job.not_before = func.clock_timestamp() + POSTPONED * job.failures
    else:
        message = f"the job could not be prepared: {reason}"
        states.fail(session, job, code="preparation_failed", message=message, param=None)


def _validating(session: orm.Session, job_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.id == job_id, Job.state == JobState.VALIDATING_FILES).with_for_update())
