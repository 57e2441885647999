"""Fine-tuning jobs as their owners see them."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence, Set
from datetime import timedelta

from sqlalchemy import Select, func, orm, select

from app import outbox, pages
from app.accounts.caller import Caller
from app.core import ids
from app.core.catalog import Catalog
from app.core.errors import NotFound
from app.core.settings import GpuSettings
from app.core.spec import USUAL, QuantizationName
from app.evaluations import leases as evaluations
from app.files import service as files
from app.jobs import admission, starting, states, tracking
from app.jobs.schemas import JobCreate
from app.models import Desired, File, FileStatus, Job, JobCheckpoint, JobEvent, JobState

RETRY_WINDOW = timedelta(minutes=5)
OVERDUE = timedelta(seconds=5)


def create(
    session: orm.Session,
    caller: Caller,
    catalog: Catalog,
    *,
    request: JobCreate,
    tiers: frozenset[str],
    gpu: GpuSettings = GpuSettings(),
    quantizations: Set[QuantizationName] = frozenset({USUAL}),
    is_retry: bool = False,
    sweep_id: str | None = None,
) -> Job:
    """Queue a fine-tuning job. `is_retry`: the SDK repeats a request it got no answer to; the first one's job is the answer."""
    base, requested = starting.understand(session, caller, catalog, request)
    queue = admission.first_queue(base, requested, among=tiers, gpu=gpu, catalog=catalog, quantizations=quantizations)
    method = request.method_name
    training_file = files.get_for_training(session, caller, request.training_file, method=method, param="training_file")
    validation_file = None
    if request.validation_file:
        validation_file = files.get_for_training(session, caller, request.validation_file, method=method, param="validation_file")
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
        continue_from=requested.continue_from.model if requested.continue_from else None,
        sweep_id=sweep_id,
        suffix=request.suffix,
        seed=request.seed if request.seed is not None else secrets.randbelow(2**31),
        user_metadata=request.metadata,
        integrations=[one.model_dump(mode="json", exclude_none=True) for one in request.integrations or ()] or None,
        request=requested.model_dump(mode="json"),
        request_sha256=_digest_of(request),
        queue=queue,
    )
    # a repeated request may come while the first is still at work: they take turns
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(caller.key_id + job.request_sha256, 0))))
    if is_retry and (made := _made_just_now(session, job)):
        return made
    states.begin(session, job, f"Created fine-tuning job: {job.id}")
    tracking.begin(session, job)
    outbox.ring(session, files.CPU_QUEUE)
    session.refresh(job)
    return job


def get(session: orm.Session, caller: Caller, job_id: str) -> Job:
    if job := session.scalar(_visible(caller).where(Job.id == job_id)):
        return job
    raise NotFound(
        f"the job {job_id!r} does not exist or is not yours; GET /v1/fine_tuning/jobs lists them", code="job_not_found"
    )


def find_all(session: orm.Session, caller: Caller, ids: Sequence[str]) -> Sequence[Job]:
    """Those that are the caller's."""
    return session.scalars(_visible(caller).where(Job.id.in_(ids))).all()


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
    job = _locked(session, caller, job_id)
    if job.state == JobState.CANCELLED:
        return job
    _require_unfinished(job, "cancelled")
    job.desired = Desired.CANCEL
    if job.state != JobState.RUNNING:
        states.move(session, job, JobState.CANCELLED, "The job was cancelled")
    return _as_stored(session, job)


def pause(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Halt a job: a waiting one at once, a running one with a checkpoint as soon as its worker hears of it. Twice is once."""
    job = _locked(session, caller, job_id)
    _require_unfinished(job, "paused")
    job.desired = Desired.PAUSE
    if job.state == JobState.QUEUED:
        states.move(session, job, JobState.PAUSED, states.PAUSED)
    return _as_stored(session, job)


def resume(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Let a paused job go on from its last checkpoint. One that is not paused is left as it is."""
    job = _locked(session, caller, job_id)
    _require_unfinished(job, "resumed")
    job.desired = Desired.RUN
    if job.state == JobState.PAUSED:
        job.queued_at = job.not_before = func.clock_timestamp()
        states.move(session, job, JobState.QUEUED, "The job was resumed")
        outbox.ring(session, job.queue)
    return _as_stored(session, job)


def _locked(session: orm.Session, caller: Caller, job_id: str) -> Job:
    job = get(session, caller, job_id)
    session.refresh(job, with_for_update=True)
    return job


def _require_unfinished(job: Job, participle: str) -> None:
    """Raises IllegalMove. A job that is to be cancelled is as good as cancelled: only its worker has yet to hear of it."""
    if job.state in states.TERMINAL:
        raise states.IllegalMove(f"job {job.id} has {job.state} and cannot be {participle}")
    if job.desired == Desired.CANCEL and participle != "cancelled":
        raise states.IllegalMove(f"job {job.id} is being cancelled and cannot be {participle}")


def _as_stored(session: orm.Session, job: Job) -> Job:
    session.flush()
    session.refresh(job)
    return job


def due_queues(session: orm.Session) -> set[str]:
    """Queues with work that nobody has taken for a while: rings get lost, and this is rung again."""
    overdue = func.clock_timestamp() - OVERDUE
    waiting = select(Job.queue).where(Job.state == JobState.QUEUED, Job.not_before <= overdue).distinct()
    queues = set(session.scalars(waiting))
    files_waiting = select(File.id).where(File.status == FileStatus.UPLOADED, File.not_before <= overdue).limit(1)
    jobs_waiting = select(Job.id).where(Job.state == JobState.VALIDATING_FILES, Job.not_before <= overdue).limit(1)
    if session.scalar(files_waiting) or session.scalar(jobs_waiting) or evaluations.is_due(session, overdue=overdue):
        queues.add(files.CPU_QUEUE)
    return queues


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
    return hashlib.sha256(request.model_dump_json(exclude={"dry_run"}).encode()).hexdigest()


def _visible(caller: Caller) -> Select[Job]:
    return select(Job).where(Job.organization_id == caller.organization_id, Job.project_id == caller.project_id)
