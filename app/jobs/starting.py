"""What a job's run begins with: a base and a fresh adapter, or a model of the caller's, which it continues."""

from sqlalchemy import orm

from app.accounts.caller import Caller
from app.adapters import service as adapters
from app.core.catalog import Base, Catalog
from app.core.errors import BadRequest, Conflict
from app.core.spec import LoraSpec, QuantizationSpec, Requested, Start, TrainSpec
from app.jobs import life
from app.jobs.schemas import JobCreate
from app.models import Adapter, Job

_SHAPE = ("rank", "alpha", "target_modules", "use_rslora", "use_dora")  # of an adapter: what its weights mean nothing without


def understand(session: orm.Session, caller: Caller, catalog: Catalog, request: JobCreate) -> tuple[Base, Requested]:
    """The base, and the settings: the shape of a model that is continued goes for what was not asked for.

    That model is locked against deletion until the commit. Raises NotFound; Conflict for a checkpoint that may yet change;
    BadRequest for settings that are not the model's.
    """
    base, requested = catalog.find(request.model), request.requested()
    name, param = request.continue_from, "continue_from"
    if base is None and request.model.startswith("ft:"):
        if name not in (None, request.model):
            message = f"model and continue_from name two models to continue, {request.model} and {name}; send one of them"
            raise BadRequest(message, param="continue_from")
        name, param = request.model, "model"
    if name is None:
        return catalog.resolve(request.model), requested
    adapter = adapters.get(session, caller, name, param=param, lock="share")
    of_model = catalog.resolve(adapter.base if param == "model" else request.model)
    if adapter.base != of_model.id:
        message = f"{name} is tuned from {adapter.base}, and model is {of_model.id}; name {adapter.base}, or {name} itself"
        raise BadRequest(message, param="model")
    was = TrainSpec.model_validate(_ended(session, adapter, param).spec)
    inherited = {
        "adapter": _with_shape_of(was.lora, request.adapter, name),
        "quantization": _as_held(was.quantization, request.quantization, name),
        "continue_from": Start(model=name, digest=adapter.digest),
    }
    return of_model, requested.model_copy(update=inherited)


def _ended(session: orm.Session, adapter: Adapter, param: str) -> Job:
    """The job that made it. Until it has ended, an attempt may write its checkpoints anew, with other bytes."""
    job = session.get_one(Job, adapter.job_id)
    if job.state not in life.TERMINAL:
        message = f"{adapter.name} is a checkpoint of job {job.id}, which has not ended; wait for its end or cancel it"
        raise Conflict(message, param=param, code="model_in_use")
    return job


def _with_shape_of(model: LoraSpec, asked: LoraSpec, name: str) -> LoraSpec:
    for field in _SHAPE:
        if field in asked.model_fields_set and not _is_same(model, asked, field):
            message = f"{name} has {field} {getattr(model, field)}, which cannot change; leave adapter.{field} out"
            raise BadRequest(message, param=f"adapter.{field}")
    if asked.init_lora_weights is not True:
        message = f"the weights are those of {name} to begin with; leave adapter.init_lora_weights out"
        raise BadRequest(message, param="adapter.init_lora_weights")
    return asked.model_copy(update={field: getattr(model, field) for field in _SHAPE})


def _is_same(model: LoraSpec, asked: LoraSpec, field: str) -> bool:
    if field == "target_modules":
        return set(model.targets) == set(asked.targets)
    return bool(getattr(model, field) == getattr(asked, field))


def _as_held(model: QuantizationSpec, asked: QuantizationSpec, name: str) -> QuantizationSpec:
    for field in asked.model_fields_set:
        if getattr(asked, field) != getattr(model, field):
            message = f"{name} belongs to a base held with {field} {getattr(model, field)}; leave quantization.{field} out"
            raise BadRequest(message, param=f"quantization.{field}")
    return model
