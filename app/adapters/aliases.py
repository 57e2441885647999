"""Aliases: a name that stays while the model behind it changes, with every change written down and a way back."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import StringConstraints
from sqlalchemy import ColumnElement, Select, and_, func, orm, select
from sqlalchemy.dialects.postgresql import insert

from app import idempotency, pages
from app.accounts.caller import Caller
from app.adapters import service as adapters
from app.core import ids
from app.core.catalog import Catalog
from app.core.errors import BadRequest, Conflict, NotFound
from app.models import Adapter, AliasAction, ModelAlias, ModelAliasChange

# no colon, which every name of a tuned model has
AliasName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

_MAKING = (AliasAction.CREATED, AliasAction.MOVED)


def create(session: orm.Session, caller: Caller, catalog: Catalog, *, name: str, model: str) -> ModelAlias:
    """A new alias at its first version. Made twice for one model it is made once."""
    require_free(catalog, name, param="name")
    target = _target(session, caller, catalog, model)
    if made := _make(session, caller, name, model=target):
        return made
    alias = get(session, caller, name)
    if alias.model != target:
        message = f"the alias {name!r} exists and stands for {alias.model}; POST /v1/model_aliases/{name} moves it"
        raise Conflict(message, param="name", code="alias_exists")
    return alias


def require_free(catalog: Catalog, name: str, *, param: str) -> None:
    """Raises BadRequest for the name of a base, which would be found first."""
    if catalog.find(name):
        raise BadRequest(f"{name!r} is the name of a base model; choose another", param=param, code="alias_is_model")


def get(session: orm.Session, caller: Caller, name: str) -> ModelAlias:
    return _found(session.scalar(_named(caller, name)), name)


def list_page(session: orm.Session, caller: Caller, *, after: str | None, limit: int) -> tuple[Sequence[ModelAlias], bool]:
    return pages.fetch(session, _visible(caller), ModelAlias.id, after=after, limit=limit)


def list_changes(
    session: orm.Session, caller: Caller, name: str, *, after: str | None = None, limit: int
) -> tuple[Sequence[ModelAliasChange], bool]:
    """Newest first. A cursor that names no change of this alias shows the first page."""
    get(session, caller, name)
    mine = select(ModelAliasChange).where(*_of(caller, name))
    sequence = mine.with_only_columns(ModelAliasChange.sequence).where(ModelAliasChange.id == after)
    cursor = session.scalar(sequence) if after else None
    return pages.fetch(session, mine, ModelAliasChange.sequence, after=cursor, limit=limit)


def list_pointed(session: orm.Session, caller: Caller) -> Sequence[tuple[ModelAlias, Adapter | None]]:
    """All of the caller's aliases, newest first, each with the tuned model behind it."""
    query = _visible(caller).add_columns(Adapter).outerjoin(Adapter, _is_behind()).order_by(ModelAlias.id.desc())
    return [(alias, adapter) for alias, adapter in session.execute(query)]


def pointed(session: orm.Session, caller: Caller, name: str, *, lock: bool = False) -> tuple[str, Adapter | None] | None:
    """The name of the model behind an alias, and the model if it is a tuned one: both as of one instant.

    `lock` keeps the alias from being moved until the commit.
    """
    query = _named(caller, name).with_only_columns(ModelAlias.model, Adapter).outerjoin(Adapter, _is_behind())
    row = session.execute(query.with_for_update(of=ModelAlias) if lock else query).one_or_none()
    return (row[0], row[1]) if row else None


def move(session: orm.Session, caller: Caller, catalog: Catalog, name: str, *, model: str) -> ModelAlias:
    """Let it stand for another model, at once for whoever asks next. Moved where it is already, it stays as it is."""
    alias = _locked(session, caller, name)
    return _moved(session, caller, alias, model=_target(session, caller, catalog, model))


def point(session: orm.Session, caller: Caller, name: str, *, model: str, job_id: str) -> ModelAlias:
    """Let it stand for the model that a job has made; a new alias if there is none of that name."""
    if made := _make(session, caller, name, model=model, job_id=job_id):
        return made
    return _moved(session, caller, _locked(session, caller, name), model=model, job_id=job_id)


def rollback(session: orm.Session, caller: Caller, catalog: Catalog, name: str, *, is_retry: bool = False) -> ModelAlias:
    """Go back to the version before, and further with every call. `is_retry`: the SDK repeats a request it got no answer to, and
    one that has been carried out is not carried out again."""
    alias = _locked(session, caller, name)
    if is_retry and _rolled_back_just_now(session, caller, name):
        return alias
    if alias.previous_version is None:
        message = f"the alias {name!r} is at its first version, {alias.model}; there is none before it to go back to"
        raise Conflict(message, code="alias_at_first_version")
    made = ModelAliasChange.version == alias.previous_version, ModelAliasChange.action.in_(_MAKING)
    before = session.scalars(select(ModelAliasChange).where(*_of(caller, name), *made)).one()
    if catalog.find(before.model) is None and adapters.find(session, caller, before.model, lock="share") is None:
        message = (
            f"version {before.version} of the alias {name!r} was {before.model}, which is gone; "
            f"POST /v1/model_aliases/{name} with another model moves it"
        )
        raise Conflict(message, code="model_not_found")
    alias.model, alias.version, alias.previous_version = before.model, before.version, before.previous_version
    return _changed(session, caller, alias, AliasAction.ROLLED_BACK)


def delete(session: orm.Session, caller: Caller, name: str) -> str:
    """Forget the alias. The model behind it stays, and so does what was written down."""
    alias = _locked(session, caller, name)
    _write(session, caller, alias, AliasAction.DELETED)
    session.delete(alias)
    return alias.id


def _target(session: orm.Session, caller: Caller, catalog: Catalog, model: str) -> str:
    """The name that an alias keeps. A tuned model cannot be deleted until the commit."""
    if base := catalog.find(model):
        return base.id
    if adapter := adapters.find(session, caller, model, lock="share"):
        return adapter.name
    if session.scalar(_named(caller, model)):
        raise BadRequest(f"{model!r} is an alias itself; name the model that it stands for", param="model")
    raise adapters.missing(session, caller, model, param="model")


def _make(session: orm.Session, caller: Caller, name: str, *, model: str, job_id: str | None = None) -> ModelAlias | None:
    """None if there is one. Its version goes on from those of one that was deleted, but no rollback leads there."""
    values = {
        "id": ids.new("alias_"),
        "organization_id": caller.organization_id,
        "project_id": caller.project_id,
        "name": name,
        "model": model,
        "version": 1,
    }
    made = session.scalar(insert(ModelAlias).values(values).on_conflict_do_nothing().returning(ModelAlias))
    if made is not None:
        made.version = _next_version(session, caller, name)  # known for sure only now that nobody else has the name
        _write(session, caller, made, AliasAction.CREATED, job_id=job_id)
    return made


def _moved(session: orm.Session, caller: Caller, alias: ModelAlias, *, model: str, job_id: str | None = None) -> ModelAlias:
    if alias.model == model:
        return alias
    alias.model, alias.previous_version = model, alias.version
    alias.version = _next_version(session, caller, alias.name)
    return _changed(session, caller, alias, AliasAction.MOVED, job_id=job_id)


def _next_version(session: orm.Session, caller: Caller, name: str) -> int:
    return 1 + (session.scalar(select(func.max(ModelAliasChange.version)).where(*_of(caller, name))) or 0)


def _changed(
    session: orm.Session, caller: Caller, alias: ModelAlias, action: AliasAction, *, job_id: str | None = None
) -> ModelAlias:
    alias.moved_at = func.clock_timestamp()
    _write(session, caller, alias, action, job_id=job_id)
    session.flush()
    session.refresh(alias)
    return alias


def _write(session: orm.Session, caller: Caller, alias: ModelAlias, action: AliasAction, *, job_id: str | None = None) -> None:
    """Of an alias that this transaction has locked or made, so that nobody else counts at the same time."""
    last = session.scalar(select(func.max(ModelAliasChange.sequence)).where(*_of(caller, alias.name)))
    session.add(
        ModelAliasChange(
            id=ids.new("aliaschange_"),
            organization_id=alias.organization_id,
            project_id=alias.project_id,
            name=alias.name,
            sequence=(last or 0) + 1,
            action=action,
            model=alias.model,
            version=alias.version,
            previous_version=alias.previous_version,
            api_key_id=caller.key_id,
            job_id=job_id,
        )
    )


def _rolled_back_just_now(session: orm.Session, caller: Caller, name: str) -> bool:
    """Whether the last thing done to it was a rollback with the same key, minutes ago."""
    newest = select(ModelAliasChange).where(*_of(caller, name)).order_by(ModelAliasChange.sequence.desc()).limit(1).subquery()
    last = orm.aliased(ModelAliasChange, newest)
    is_it = last.action == AliasAction.ROLLED_BACK, last.api_key_id == caller.key_id
    is_recent = last.created_at > func.clock_timestamp() - idempotency.RETRY_WINDOW
    return session.scalar(select(last.id).where(*is_it, is_recent)) is not None


def _locked(session: orm.Session, caller: Caller, name: str) -> ModelAlias:
    query = _named(caller, name).with_for_update().execution_options(populate_existing=True)
    return _found(session.scalar(query), name)


def _found(alias: ModelAlias | None, name: str) -> ModelAlias:
    if alias is None:
        message = f"the alias {name!r} does not exist or is not yours; GET /v1/model_aliases lists them"
        raise NotFound(message, code="alias_not_found")
    return alias


def _named(caller: Caller, name: str) -> Select[ModelAlias]:
    return _visible(caller).where(ModelAlias.name == name)


def _visible(caller: Caller) -> Select[ModelAlias]:
    return select(ModelAlias).where(
        ModelAlias.organization_id == caller.organization_id, ModelAlias.project_id == caller.project_id
    )


def _of(caller: Caller, name: str) -> tuple[ColumnElement[bool], ...]:
    """The changes of one alias, and of those that had its name before."""
    of_project = ModelAliasChange.organization_id == caller.organization_id, ModelAliasChange.project_id == caller.project_id
    return (*of_project, ModelAliasChange.name == name)


def _is_behind() -> ColumnElement[bool]:
    return and_(Adapter.name == ModelAlias.model, Adapter.project_id == ModelAlias.project_id)
