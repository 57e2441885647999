from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from app.adapters import aliases, names
from app.adapters import service as adapters
from app.core.catalog import Base
from app.core.clock import unix
from app.deps import BaseModels, Caller, Session
from app.idempotency import IdempotentRoute
from app.models import Adapter, ModelAlias

router = APIRouter(prefix="/v1", tags=["Models"], route_class=IdempotentRoute)


class ModelOut(BaseModel):
    """A base model, one of yours, or an alias: then `alias_of` names the model behind it.

    `base_model` is the catalog id it runs on.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    base_model: str
    job_id: str | None = None
    size_bytes: int | None = None
    context_length: int | None = None
    licence: str | None = None
    alias_of: str | None = None

    @classmethod
    def of_base(cls, base: Base) -> "ModelOut":
        return cls(
            id=base.id, created=0, owned_by="base", base_model=base.id, context_length=base.context_length, licence=base.licence
        )

    @classmethod
    def of_adapter(cls, adapter: Adapter) -> "ModelOut":
        return cls(
            id=adapter.name,
            created=unix(adapter.created_at),
            owned_by=adapter.organization_id,
            base_model=adapter.base,
            job_id=adapter.job_id,
            size_bytes=adapter.size_bytes,
        )

    @classmethod
    def of_alias(cls, alias: ModelAlias, adapter: Adapter | None) -> "ModelOut":
        return cls(
            id=alias.name,
            created=unix(alias.created_at),
            owned_by=alias.organization_id,
            base_model=adapter.base if adapter else alias.model,
            alias_of=alias.model,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]
    has_more: bool = False


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


@router.get("/models")
def list_models(session: Session, caller: Caller, catalog: BaseModels) -> ModelList:
    """Your models, newest first, then your aliases, then the base models."""
    mine = [ModelOut.of_adapter(adapter) for adapter in adapters.list_published(session, caller)]
    named = [ModelOut.of_alias(alias, adapter) for alias, adapter in aliases.list_pointed(session, caller)]
    return ModelList(data=mine + named + [ModelOut.of_base(base) for base in catalog.values()])


@router.get("/models/{model:path}")
def get_model(model: str, session: Session, caller: Caller, catalog: BaseModels) -> ModelOut:
    """One model by its name."""
    named = names.resolve(session, caller, catalog, model)
    if named.alias:
        return ModelOut.of_alias(aliases.get(session, caller, named.alias), named.adapter)
    return ModelOut.of_adapter(named.adapter) if named.adapter else ModelOut.of_base(named.base)


@router.delete("/models/{model:path}")
def delete_model(model: str, session: Session, caller: Caller, catalog: BaseModels) -> ModelDeleted:
    """Delete a model of yours and its weights."""
    return ModelDeleted(id=adapters.delete(session, caller, catalog, model))
