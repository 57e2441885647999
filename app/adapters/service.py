"""Published models: a public name, a row, an immutable directory in storage."""

from typing import Literal

from sqlalchemy import ColumnElement, Select, or_, orm, select
from sqlalchemy import delete as delete_rows

from app import outbox
from app.accounts.caller import Caller
from app.core import ids
from app.core.catalog import Catalog
from app.core.engine import AdapterRef
from app.core.errors import AppError, BadRequest, Conflict, NotFound
from app.core.manifest import Manifest
from app.core.spec import QuantizationSpec, Requested
from app.models import Adapter, Job, JobCheckpoint, ModelAlias
from app.models.jobs import UNFINISHED


def name_of(job: Job, *, step: int | None = None) -> str:
    """`ft:{base}:{org}:{suffix}:{id8}`, for checkpoints with `:ckpt-step-{n}` behind."""
    name = f"ft:{job.base}:{job.organization_slug}:{job.suffix or ''}:{job.id[-8:]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def publish(
    session: orm.Session, job: Job, *, name: str, step: int | None, prefix: str, manifest: Manifest, is_live: bool = True
) -> Adapter:
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
        is_live=is_live,
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


def valid_loss_of(session: orm.Session, adapter: Adapter) -> float | None:
    """Nats per token, of the validation at its step; None where nothing was held back."""
    if adapter.step is None:
        return session.get_one(Job, adapter.job_id).valid_loss
    of_step = JobCheckpoint.job_id == adapter.job_id, JobCheckpoint.step == adapter.step
    metrics = session.scalar(select(JobCheckpoint.metrics).where(*of_step)) or {}
    return metrics.get("valid_loss")


def find(session: orm.Session, caller: Caller, name: str, *, lock: Literal["share", "update"] | None = None) -> Adapter | None:
    """`lock`: until the commit nobody deletes it, or nobody else locks it."""
    query = _visible(caller).where(Adapter.name == name)
    return session.scalar(query if lock is None else query.with_for_update(read=lock == "share"))


def get(
    session: orm.Session, caller: Caller, name: str, *, param: str | None = None, lock: Literal["share", "update"] | None = None
) -> Adapter:
    """Raises NotFound. `lock` as in `find`."""
    if adapter := find(session, caller, name, lock=lock):
        return adapter
    raise missing(session, caller, name, param=param)


def missing(session: orm.Session, caller: Caller, name: str, *, param: str | None = None) -> NotFound:
    """What is said of a name that means nothing to the caller, or not yet."""
    held_back = select(Job.id, Job.state).join(Adapter, Adapter.job_id == Job.id).where(*_owned(caller), Adapter.name == name)
    if row := session.execute(held_back.where(~Adapter.is_live)).one_or_none():
        is_undecided = row.state in UNFINISHED
        why = "yet: its quality gate is being evaluated" if is_undecided else "as it has not passed its quality gate"
        advice = f"GET /v1/fine_tuning/jobs/{row.id} tells" if is_undecided else _publishes(row.id)
        return NotFound(f"the model {name!r} is not live {why}; {advice}", param=param, code="model_not_live")
    message = f"the model {name!r} does not exist or is not yours; GET /v1/models lists them"
    return NotFound(message, param=param, code="model_not_found")


def _publishes(job_id: str) -> str:
    return f"POST /v1/fine_tuning/jobs/{job_id}/publish makes it live"


def find_start(session: orm.Session, job: Job) -> AdapterRef | None:
    """The model that a job continues, if it does and the model is there."""
    mine = select(Adapter).where(Adapter.organization_id == job.organization_id, Adapter.name == job.continue_from)
    adapter = session.scalar(mine)
    return ref_of(adapter) if adapter else None


def list_published(session: orm.Session, caller: Caller) -> list[Adapter]:
    """The caller's final models, newest first; checkpoints answer by name but are listed with their job."""
    return list(session.scalars(_visible(caller).where(Adapter.step.is_(None)).order_by(Adapter.id.desc())))


def delete(session: orm.Session, caller: Caller, catalog: Catalog, name: str) -> str:
    """Forget a model and free its storage. Neither base models nor what an alias stands for can be deleted."""
    if catalog.find(name):
        raise BadRequest(f"{name} is a base model and cannot be deleted", param="model", code="model_not_deletable")
    mine = select(Adapter).where(*_owned(caller), Adapter.name == name)
    of_job = mine.with_only_columns(Adapter.job_id).scalar_subquery()
    job_id = session.scalar(select(Job.id).where(Job.id == of_job, Job.state.in_(UNFINISHED)).with_for_update())
    if job_id is not None:
        raise Conflict(f"job {job_id} needs {name}; cancel it or wait for its end", code="model_in_use")
    adapter = session.scalar(mine.with_for_update())  # after its job, as everybody locks them
    if adapter is None:
        raise _unknown_or_alias(session, caller, name)
    _require_unpointed(session, adapter)
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


def _require_unpointed(session: orm.Session, adapter: Adapter) -> None:
    """Of a locked row, which whoever points an alias at it holds too: none is missed."""
    behind = ModelAlias.model == adapter.name, ModelAlias.project_id == adapter.project_id
    if alias := session.scalar(select(ModelAlias.name).where(*behind).limit(1)):
        message = (
            f"the alias {alias!r} stands for {adapter.name}; move it with POST /v1/model_aliases/{alias}, or delete it, first"
        )
        raise Conflict(message, code="model_in_use")


def _unknown_or_alias(session: orm.Session, caller: Caller, name: str) -> AppError:
    mine = ModelAlias.organization_id == caller.organization_id, ModelAlias.project_id == caller.project_id
    if session.scalar(select(ModelAlias.id).where(*mine, ModelAlias.name == name)):
        message = f"{name} is an alias, and no model; DELETE /v1/model_aliases/{name} deletes it"
        return BadRequest(message, param="model", code="model_not_deletable")
    return missing(session, caller, name)


def _visible(caller: Caller) -> Select[Adapter]:
    """Those that answer the caller."""
    return select(Adapter).where(*_owned(caller), or_(Adapter.is_live, Adapter.job_id == caller.candidate_of))


def _owned(caller: Caller) -> tuple[ColumnElement[bool], ...]:
    return Adapter.organization_id == caller.organization_id, Adapter.project_id == caller.project_id
