"""Fine-tuning jobs as their owners see them, and the first step of their life: validated, sized, queued."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Select, func, orm, select

from app import outbox, pages
from app.accounts.caller import Caller
from app.core import ids, memory, spec
from app.core.catalog import Base, Catalog
from app.core.chat import Problem
from app.core.errors import BadRequest, NotFound
from app.core.settings import LeaseSettings
from app.files import service as files
from app.jobs import events, states
from app.jobs.schemas import JobCreate
from app.models import Desired, File, FileStatus, Job, JobCheckpoint, JobEvent, JobState

PREPARE_LEASE = timedelta(minutes=10)
RETRY_WINDOW = timedelta(minutes=5)
POSTPONED = timedelta(seconds=5)


@dataclass(frozen=True)
class ToPrepare:
    """A job whose files are valid, in the hands of one preparer."""

    id: str
    organization_id: str
    queue: str
    base: str
    seed: int
    requested: spec.Requested
    training_key: str
    validation_key: str | None


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


def create(
    session: orm.Session, caller: Caller, catalog: Catalog, *, request: JobCreate, tiers: frozenset[str], is_retry: bool = False
) -> Job:
    """Queue a fine-tuning job. `is_retry`: the SDK repeats a request it got no answer to; the first one's job is the answer."""
    base = catalog.resolve(request.model)
    queue = _queue_for(base, tiers)
    training_file = files.get_for_training(session, caller, request.training_file, param="training_file")
    validation_file = None
    if request.validation_file:
        validation_file = files.get_for_training(session, caller, request.validation_file, param="validation_file")
    job = Job(
        id=ids.new("ftjob-"),
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        organization_slug=caller.organization_slug,
        requested_model=request.model,
        base=base.id,
        training_file_id=training_file.id,
        validation_file_id=validation_file.id if validation_file else None,
        suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        user_metadata=request.metadata,
        request=request.requested().model_dump(mode="json"),
        request_sha256=_digest_of(request),
        queue=queue,
    )
    # a repeated request may come while the first is still at work: they take turns
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(caller.key_id + job.request_sha256, 0))))
    if is_retry and (made := _made_just_now(session, job)):
        return made
    states.begin(session, job, f"Created fine-tuning job: {job.id}")
    outbox.ring(session, files.CPU_QUEUE)
    session.refresh(job)
    return job


def get(session: orm.Session, caller: Caller, job_id: str) -> Job:
    if job := session.scalar(_visible(caller).where(Job.id == job_id)):
        return job
    raise NotFound(
        f"the job {job_id!r} does not exist or is not yours; GET /v1/fine_tuning/jobs lists them", code="job_not_found"
    )


def list_page(
    session: orm.Session, caller: Caller, *, metadata: Mapping[str, str], after: str | None, limit: int
) -> tuple[Sequence[Job], bool]:
    query = _visible(caller)
    if metadata:
        query = query.where(Job.user_metadata.contains(dict(metadata)))
    return pages.fetch(session, query, Job.id, after=after, limit=limit)


def list_events(
    session: orm.Session, caller: Caller, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[JobEvent], bool]:
    """Newest first. A cursor that names no event of this job shows the first page."""
    job = get(session, caller, job_id)
    mine = select(JobEvent).where(JobEvent.organization_id == job.organization_id, JobEvent.job_id == job.id)
    cursor = session.scalar(mine.with_only_columns(JobEvent.sequence).where(JobEvent.id == after)) if after else None
    return pages.fetch(session, mine, JobEvent.sequence, after=cursor, limit=limit)


def list_checkpoints(
    session: orm.Session, caller: Caller, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[JobCheckpoint], bool]:
    """Newest first."""
    job = get(session, caller, job_id)
    query = select(JobCheckpoint).where(JobCheckpoint.organization_id == job.organization_id, JobCheckpoint.job_id == job.id)
    return pages.fetch(session, query, JobCheckpoint.id, after=after, limit=limit)


def cancel(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Stop a job: a waiting one at once, a running one as soon as its worker hears of it. Twice is the same as once."""
    job = get(session, caller, job_id)
    session.refresh(job, with_for_update=True)
    if job.state == JobState.CANCELLED:
        return job
    if job.state in states.TERMINAL:
        raise states.IllegalMove(f"job {job.id} has {job.state} and cannot be cancelled")
    job.desired = Desired.CANCEL
    if job.state != JobState.RUNNING:
        states.move(session, job, JobState.CANCELLED, "The job was cancelled")
    session.flush()
    session.refresh(job)
    return job


def claim_to_prepare(session: orm.Session) -> ToPrepare | None:
    """The oldest job whose files have been validated. One whose file turned out bad fails here, with the reason."""
    validation = orm.aliased(File)
    row = session.execute(
        select(Job, File, validation)
        .join(File, File.id == Job.training_file_id)
        .outerjoin(validation, validation.id == Job.validation_file_id)
        .where(
            Job.state == JobState.VALIDATING_FILES,
            Job.not_before <= func.clock_timestamp(),
            File.status != FileStatus.UPLOADED,
            func.coalesce(validation.status, "") != FileStatus.UPLOADED,
        )
        .order_by(Job.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    ).one_or_none()
    if row is None:
        return None
    job, training_file, validation_file = row
    job.not_before = func.clock_timestamp() + PREPARE_LEASE
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        if file is not None and file.status == FileStatus.ERROR:
            _reject(session, job, code="invalid_file", message=f"{file.id} is not valid: {file.status_details}", param=param)
            return claim_to_prepare(session)
    return ToPrepare(
        id=job.id,
        organization_id=job.organization_id,
        queue=job.queue,
        base=job.base,
        seed=job.seed,
        requested=spec.Requested.model_validate(job.request),
        training_key=training_file.storage_key,
        validation_key=validation_file.storage_key if validation_file else None,
    )


def finish_preparing(
    session: orm.Session,
    job_id: str,
    *,
    resolved: spec.TrainSpec,
    plan: dict[str, Any],
    datasets: Datasets,
    dropped: Sequence[Problem] = (),
) -> None:
    """Let the workers have it. A job that was cancelled meanwhile stays so."""
    job = _validating(session, job_id)
    if job is None:
        return
    job.spec = resolved.model_dump(mode="json")
    job.plan = plan
    job.datasets = datasets.model_dump(mode="json")
    job.queued_at = job.not_before = func.clock_timestamp()
    for problem in dropped:
        events.append(session, job, f"Line {problem.line} is left out: {problem.message}", level="warn")
    states.move(session, job, JobState.QUEUED, "Files validated, moving job to queued state", data=plan)
    outbox.ring(session, job.queue)


def reject(session: orm.Session, job_id: str, *, code: str, message: str, param: str) -> None:
    """The data cannot be trained on with this base and these settings."""
    if job := _validating(session, job_id):
        _reject(session, job, code=code, message=message, param=param)


def postpone(session: orm.Session, job_id: str) -> None:
    """Whoever had it in hand could not go on; another may try shortly."""
    if job := _validating(session, job_id):
        job.not_before = func.clock_timestamp() + POSTPONED


def preparation_failed(session: orm.Session, job_id: str, *, reason: str, settings: LeaseSettings) -> None:
    """Another may try shortly, unless too many have."""
    job = _validating(session, job_id)
    if job is None:
        return
    job.failures += 1
    if job.failures < settings.max_attempts:
        job.not_before = func.clock_timestamp() + POSTPONED * job.failures
    else:
        message = f"the job could not be prepared: {reason}"
        _reject(session, job, code="preparation_failed", message=message, param=None)


def due_queues(session: orm.Session) -> set[str]:
    """Queues with work that nobody has taken for a while: rings get lost, and this is rung again."""
    overdue = func.clock_timestamp() - timedelta(seconds=5)
    waiting = select(Job.queue).where(Job.state == JobState.QUEUED, Job.not_before <= overdue).distinct()
    queues = set(session.scalars(waiting))
    files_waiting = select(File.id).where(File.status == FileStatus.UPLOADED, File.not_before <= overdue).limit(1)
    jobs_waiting = select(Job.id).where(Job.state == JobState.VALIDATING_FILES, Job.not_before <= overdue).limit(1)
    if session.scalar(files_waiting) or session.scalar(jobs_waiting):
        queues.add(files.CPU_QUEUE)
    return queues


def plan_of(
    base: Base, resolved: spec.TrainSpec, *, examples: int, dropped: int, tokens: int, trained_tokens: int
) -> dict[str, Any]:
    """What the job will do, in numbers its owner can check."""
    predicted = memory.predict(base.architecture, resolved.lora, micro_batch_tokens=resolved.micro_batch_tokens)
    return {
        "examples": examples,
        "dropped_examples": dropped,
        "tokens_per_epoch": tokens,
        "trained_tokens_per_epoch": trained_tokens,
        "total_steps": resolved.total_steps(examples),
        "adapter_parameters": memory.adapter_parameters(base.architecture, resolved.lora),
        "predicted_peak_bytes": predicted.peak_bytes,
    }


def _queue_for(base: Base, tiers: frozenset[str]) -> str:
    """The smallest tier of this installation that holds the base. Raises BadRequest."""
    big_enough = sorted((tier for tier in tiers if _holds(tier, base)), key=lambda tier: 0 if tier == "cpu" else int(tier))
    if not big_enough:
        has = ", ".join("cpu" if tier == "cpu" else f"{tier} GB" for tier in sorted(tiers))
        message = f"{base.id} needs a GPU worker of {base.tier} GB; this installation has: {has}"
        raise BadRequest(message, param="model", code="no_worker_for_model")
    return f"train.{big_enough[0]}"


def _holds(tier: str, base: Base) -> bool:
    if tier == "cpu":
        return base.tier == "cpu"
    return base.tier == "cpu" or int(tier) >= int(base.tier)


def _made_just_now(session: orm.Session, job: Job) -> Job | None:
    """The job that the same key made with the same body in the last minutes."""
    return session.scalar(
        select(Job)
        .where(
            Job.organization_id == job.organization_id,
            Job.api_key_id == job.api_key_id,
            Job.request_sha256 == job.request_sha256,
            Job.created_at > func.clock_timestamp() - RETRY_WINDOW,
        )
        .order_by(Job.id.desc())
        .limit(1)
    )


def _digest_of(request: JobCreate) -> str:
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()


def _validating(session: orm.Session, job_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.id == job_id, Job.state == JobState.VALIDATING_FILES).with_for_update())


def _reject(session: orm.Session, job: Job, *, code: str, message: str, param: str | None) -> None:
    job.error = {"code": code, "message": message, "param": param}
    states.move(session, job, JobState.FAILED, message, level="error", data=job.error)


def _visible(caller: Caller) -> Select[Job]:
    return select(Job).where(Job.organization_id == caller.organization_id, Job.project_id == caller.project_id)
