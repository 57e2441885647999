"""Fine-tuning jobs as their owners see them."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence, Set
from datetime import timedelta
from types import MappingProxyType

from sqlalchemy import Select, func, orm, select
from sqlalchemy.sql.base import ExecutableOption

from app import db, idempotency, outbox, pages
from app.accounts.caller import Caller
from app.core import ids, tracing
from app.core.catalog import Catalog
from app.core.errors import NotFound
from app.core.settings import EvaluationSettings, GpuSettings
from app.core.spec import USUAL, QuantizationName
from app.evaluations import leases as evaluations
from app.files import service as files
from app.jobs import admission, gates, life, preparing, starting, states, tracking, turns
from app.jobs.schemas import JobCreate
from app.models import Evaluation, File, Job, JobCheckpoint, JobEvent, JobState

OVERDUE = timedelta(seconds=5)


def create(
    session: orm.Session,
    caller: Caller,
    catalog: Catalog,
    *,
    request: JobCreate,
    tiers: frozenset[str],
    gpu: GpuSettings = GpuSettings(),
    limits: EvaluationSettings = EvaluationSettings(),
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
    gate = gates.plan(session, caller, catalog, base=base, request=request, limits=limits)
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
        quality_gate=gate.model_dump(mode="json") if gate else None,
        alias=request.alias,
        trace=tracing.current(),
    )
    # a repeated request may come while the first is still at work: they take turns
    db.take_turns(session, caller.key_id + job.request_sha256)
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
    session: orm.Session,
    caller: Caller,
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
    after: str | None,
    limit: int,
    options: Sequence[ExecutableOption] = (),
) -> tuple[Sequence[Job], bool]:
    """The newest first. `options` may leave out columns that the caller does not read."""
    query = _visible(caller).options(*options)
    if metadata:
        query = query.where(Job.user_metadata.contains(dict(metadata)))
    return pages.fetch(session, query, Job.id, after=after, limit=limit)


def list_events(
    session: orm.Session, caller: Caller, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[JobEvent], bool]:
    """Newest first. A cursor that names no event of this job shows the first page."""
    job = get(session, caller, job_id)
    mine = select(JobEvent).where(JobEvent.organization_id == job.organization_id, JobEvent.job_id == job.id)
    return pages.fetch(session, mine, JobEvent.sequence, after=_sequence_of(session, job, after) or None, limit=limit)


def list_messages(session: orm.Session, caller: Caller, job_id: str, *, limit: int) -> tuple[Sequence[JobEvent], bool]:
    """The newest events that are not metrics of a step."""
    job = get(session, caller, job_id)
    its = JobEvent.organization_id == job.organization_id, JobEvent.job_id == job.id, JobEvent.type == "message"
    return pages.fetch(session, select(JobEvent).where(*its), JobEvent.sequence, after=None, limit=limit)


def sequence_of(session: orm.Session, caller: Caller, job_id: str, event_id: str | None) -> int:
    """Where in the job's events this one stands; 0, which is before all, if it is none of them."""
    return _sequence_of(session, get(session, caller, job_id), event_id)


def list_checkpoints(
    session: orm.Session, caller: Caller, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[JobCheckpoint], bool]:
    """Newest first."""
    job = get(session, caller, job_id)
    query = select(JobCheckpoint).where(JobCheckpoint.organization_id == job.organization_id, JobCheckpoint.job_id == job.id)
    return pages.fetch(session, query, JobCheckpoint.id, after=after, limit=limit)


def cancel(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Stop a job: a waiting one at once, and one whose model is evaluated; a running one as soon as its worker hears of it.

    Twice is the same as once.
    """
    job = _locked(session, caller, job_id)
    after = life.cancelled(states.life_of(job))
    if job.state == JobState.EVALUATING:
        gates.stop(session, job)
    states.become(session, job, after, states.CANCELLED)
    return _as_stored(session, job)


def pause(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Halt a job: a waiting one at once, a running one with a checkpoint as soon as its worker hears of it. Twice is once."""
    job = _locked(session, caller, job_id)
    states.become(session, job, life.paused(states.life_of(job)), states.PAUSED)
    return _as_stored(session, job)


def resume(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Let a paused job go on from its last checkpoint. One that is not paused is left as it is."""
    job = _locked(session, caller, job_id)
    after = life.resumed(states.life_of(job))
    if after.state != job.state:
        job.queued_at = job.not_before = func.clock_timestamp()
        outbox.ring(session, job.queue)
    states.become(session, job, after, "The job was resumed")
    return _as_stored(session, job)


def publish(session: orm.Session, caller: Caller, job_id: str) -> Job:
    """Let a model go live by hand that its quality gate has kept back. Twice is the same as once."""
    job = _locked(session, caller, job_id)
    gates.publish(session, job)
    return _as_stored(session, job)


def _sequence_of(session: orm.Session, job: Job, event_id: str | None) -> int:
    if event_id is None:
        return 0
    its = JobEvent.organization_id == job.organization_id, JobEvent.job_id == job.id, JobEvent.id == event_id
    return session.scalar(select(JobEvent.sequence).where(*its)) or 0


def _locked(session: orm.Session, caller: Caller, job_id: str) -> Job:
    job = get(session, caller, job_id)
    session.refresh(job, with_for_update=True)
    return job


def _as_stored(session: orm.Session, job: Job) -> Job:
    session.flush()
    session.refresh(job)
    return job


def due_queues(session: orm.Session) -> set[str]:
    """Queues with work that nobody has taken for a while: rings get lost, and this is rung again."""
    overdue = func.clock_timestamp() - OVERDUE
    queues = set(session.scalars(select(Job.queue).where(turns.claimable(overdue)).distinct()))
    of_cpu = (
        select(File.id).where(files.claimable(overdue)),
        select(Job.id).where(preparing.claimable(overdue)),
        select(Job.id).where(gates.decidable()),
        select(Evaluation.id).where(evaluations.claimable(overdue)),
    )
    if any(session.scalar(waiting.limit(1)) for waiting in of_cpu):
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
            Job.created_at > func.clock_timestamp() - idempotency.RETRY_WINDOW,
        )
        .order_by(Job.id.desc())
        .limit(1)
    )


def _digest_of(request: JobCreate) -> str:
    return hashlib.sha256(request.model_dump_json(exclude={"dry_run"}).encode()).hexdigest()


def _visible(caller: Caller) -> Select[Job]:
    return select(Job).where(Job.organization_id == caller.organization_id, Job.project_id == caller.project_id)
