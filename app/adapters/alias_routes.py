from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, StringConstraints

from app import pages
from app.adapters import aliases
from app.adapters.aliases import AliasName
from app.core.clock import unix
from app.deps import BaseModels, Caller, IsRetry, Session
from app.idempotency import IdempotentRoute
from app.models import ModelAlias, ModelAliasChange
from app.schemas import Request

router = APIRouter(prefix="/v1/model_aliases", tags=["Models"], route_class=IdempotentRoute)

SHOWN_CHANGES = 20


class AliasMove(Request):
    """`model` is a base model or one of yours, a checkpoint too."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]


class AliasCreate(AliasMove):
    name: AliasName


class ChangeOut(BaseModel):
    """What was done to an alias: from then on it stood for `model`. `job_id` is set where a job moved it."""

    id: str
    object: Literal["model_alias.change"] = "model_alias.change"
    created_at: int
    action: str
    version: int
    model: str
    api_key_id: str
    job_id: str | None

    @classmethod
    def of(cls, change: ModelAliasChange) -> "ChangeOut":
        return cls(
            id=change.id,
            created_at=unix(change.created_at),
            action=change.action,
            version=change.version,
            model=change.model,
            api_key_id=change.api_key_id,
            job_id=change.job_id,
        )


class AliasOut(BaseModel):
    """An alias. A rollback leads to `previous_version`; null at the first one."""

    id: str
    object: Literal["model_alias"] = "model_alias"
    created_at: int
    name: str
    model: str
    version: int
    previous_version: int | None
    moved_at: int

    @classmethod
    def of(cls, alias: ModelAlias) -> "AliasOut":
        return cls(
            id=alias.id,
            created_at=unix(alias.created_at),
            name=alias.name,
            model=alias.model,
            version=alias.version,
            previous_version=alias.previous_version,
            moved_at=unix(alias.moved_at),
        )


class AliasWithHistory(AliasOut):
    """And its last changes, newest first."""

    history: list[ChangeOut]


class AliasDeleted(BaseModel):
    id: str
    object: Literal["model_alias"] = "model_alias"
    name: str
    deleted: bool = True


@router.post("")
def create_alias(body: AliasCreate, session: Session, caller: Caller, catalog: BaseModels) -> AliasOut:
    """Give a model a name that can be moved to another."""
    return AliasOut.of(aliases.create(session, caller, catalog, name=body.name, model=body.model))


@router.get("")
def list_aliases(session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20) -> pages.Page[AliasOut]:
    """Your aliases, newest first."""
    return pages.page(aliases.list_page(session, caller, after=after, limit=limit), AliasOut.of)


@router.get("/{name}")
def get_alias(name: str, session: Session, caller: Caller) -> AliasWithHistory:
    """One alias with its last 20 changes."""
    alias = AliasOut.of(aliases.get(session, caller, name))
    changes, _ = aliases.list_changes(session, caller, name, limit=SHOWN_CHANGES)
    return AliasWithHistory(**alias.model_dump(), history=[ChangeOut.of(change) for change in changes])


@router.get("/{name}/history")
def list_alias_changes(
    name: str, session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[ChangeOut]:
    """Everything that was done to an alias of this name, newest first."""
    return pages.page(aliases.list_changes(session, caller, name, after=after, limit=limit), ChangeOut.of)


@router.post("/{name}")
def move_alias(name: str, body: AliasMove, session: Session, caller: Caller, catalog: BaseModels) -> AliasOut:
    """Let an alias stand for another model. Whoever asks next is answered by that."""
    return AliasOut.of(aliases.move(session, caller, catalog, name, model=body.model))


@router.post("/{name}/rollback")
def roll_alias_back(
    name: str,
    session: Session,
    caller: Caller,
    catalog: BaseModels,
    is_retry: IsRetry,
) -> AliasOut:
    """Go back to the version before; again, and it goes to the one before that."""
    return AliasOut.of(aliases.rollback(session, caller, catalog, name, is_retry=is_retry))


@router.delete("/{name}")
def delete_alias(name: str, session: Session, caller: Caller) -> AliasDeleted:
    """Delete an alias. The model behind it stays."""
    return AliasDeleted(id=aliases.delete(session, caller, name), name=name)
