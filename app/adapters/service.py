"""Published models: a public name, a row, an immutable directory in storage."""

from typing import Literal

from sqlalchemy import Select, orm, select
from sqlalchemy import delete as delete_rows

from app import outbox
from app.accounts.caller import Caller
from app.core import ids
from app.core.catalog import Catalog
from app.core.engine import AdapterRef
from app.core.errors import BadRequest, Conflict, NotFound
from app.core.manifest import Manifest
from app.core.spec import QuantizationSpec, Requested
from app.models import Adapter, Job, JobCheckpoint
from app.models.jobs import UNFINISHED


def name_of(job: Job, *, step: int | None = None) -> str:
    """`ft:{base}:{org}:{suffix}:{id8}`, for checkpoints with `:ckpt-step-{n}` behind."""
    name = f"ft:{job.base}:{job.organization_slug}:{job.suffix or ''}:{job.id[-8:]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def publish(session: orm.Session, job: Job, *, name: str, step: int | None, prefix: str, manifest: Manifest) -> Adapter:
    """Give a verified directory its name. The database allows one final adapter per job."""
    adapter = Adapter(
        id=ids.new("adapter_"),
        organization_id=job.organization_id,
        project_id=job.project_id,
        name=name,
        base=job.base,
        base_digest=manifest.base.digest,
        job_id=job.id,
        step=step,
        digest=manifest.digest,
        prefix=prefix,
        size_bytes=manifest.size_bytes,
    )
    session.add(adapter)
    return adapter


def move(session: orm.Session, name: str, *, prefix: str, manifest: Manifest) -> None:
    """Let a name stand for another directory: engines know it by its digest, and so take the two for two."""
    adapter = session.scalars(select(Adapter).where(Adapter.name == name)).one()
    adapter.prefix, adapter.digest, adapter.size_bytes = prefix, manifest.digest, manifest.size_bytes
    adapter.base_digest = manifest.base.digest


def ref_of(adapter: Adapter) -> AdapterRef:
    """What an engine needs to load it."""
    return AdapterRef(
        id=adapter.id, digest=adapter.digest, prefix=adapter.prefix, base=adapter.base, base_digest=adapter.base_digest
    )


def quantization_of(session: orm.Session, adapter: Adapter) -> QuantizationSpec:
    """How the base was held that it was trained on."""
    request = session.scalars(select(Job.request).where(Job.id == adapter.job_id)).one()
    return Requested.model_validate(request).quantization


def find(session: orm.Session, caller: Caller, name: str) -> Adapter | None:
    return session.scalar(_visible(caller).where(Adapter.name == name))


def get(
    session: orm.Session, caller: Caller, name: str, *, param: str | None = None, lock: Literal["share", "update"] | None = None
) -> Adapter:
    """`lock`: until the commit nobody deletes it, or nobody else locks it."""
    query = _visible(caller).where(Adapter.name == name)
    if adapter := session.scalar(query if lock is None else query.with_for_update(read=lock == "share")):
        return adapter
    message = f"the model {name!r} does not exist or is not yours; GET /v1/models lists them"
    raise NotFound(message, param=param, code="model_not_found")


def find_start(session: orm.Session, job: Job) -> AdapterRef | None:
    """The model that a job continues, if it does and the model is there."""
    mine = select(Adapter).where(Adapter.organization_id == job.organization_id, Adapter.name == job.continue_from)
    adapter = session.scalar(mine)
    return ref_of(adapter) if adapter else None


def list_published(session: orm.Session, caller: Caller) -> list[Adapter]:
    """The caller's final models, newest first; checkpoints answer by name but are listed with their job."""
    return list(session.scalars(_visible(caller).where(Adapter.step.is_(None)).order_by(Adapter.id.desc())))


def delete(session: orm.Session, caller: Caller, catalog: Catalog, name: str) -> str:
    """Forget a model and free its storage. Base models cannot be deleted."""
    if catalog.find(name):
        raise BadRequest(f"{name} is a base model and cannot be deleted", param="model", code="model_not_deletable")
    adapter = get(session, caller, name, lock="update")
    job_id = session.scalar(select(Job.id).where(Job.id == adapter.job_id, Job.state.in_(UNFINISHED)).with_for_update())
    if job_id is not None:
        raise Conflict(f"job {job_id} may have to go on from {name}; cancel it or wait for its end", code="model_in_use")
    continues_it = (Job.organization_id == caller.organization_id, Job.continue_from == name, Job.state.in_(UNFINISHED))
    if job_id := session.scalar(select(Job.id).where(*continues_it).limit(1)):
        raise Conflict(f"job {job_id} continues {name}; cancel it or wait for its end", code="model_in_use")
    prefix = adapter.prefix
    if adapter.step is not None:
        of_step = (JobCheckpoint.job_id == adapter.job_id, JobCheckpoint.step == adapter.step)
        checkpoint = session.scalars(delete_rows(JobCheckpoint).where(*of_step).returning(JobCheckpoint)).one()
        prefix = checkpoint.prefix  # with a training state in it, if the job is one of an earlier release
    session.delete(adapter)
    outbox.put(session, outbox.Topic.PURGE, {"prefix": f"{prefix}/"})
    return adapter.name


def _visible(caller: Caller) -> Select[Adapter]:
    return select(Adapter).where(Adapter.organization_id == caller.organization_id, Adapter.project_id == caller.project_id)
