"""What the name of a model means to whoever says it: a base of the catalog, a model of theirs, or an alias of one of both."""

from dataclasses import dataclass

from sqlalchemy import orm

from app.accounts.caller import Caller
from app.adapters import aliases
from app.adapters import service as adapters
from app.core.catalog import Base, Catalog
from app.models import Adapter


@dataclass(frozen=True)
class Named:
    """A name, understood. `model` is the one that answers; `alias` is what it was called, if that was an alias."""

    model: str
    base: Base
    adapter: Adapter | None = None
    alias: str | None = None


def resolve(session: orm.Session, caller: Caller, catalog: Catalog, name: str, *, param: str | None = None) -> Named:
    """Raises NotFound. A base is found before an alias that was named so before the base was there."""
    if base := catalog.find(name):
        return Named(name, base)
    alias, adapter = None, adapters.find(session, caller, name)
    if adapter is None and (pointed := aliases.pointed(session, caller, name)):
        alias, (name, adapter) = name, pointed
    if base := catalog.find(adapter.base if adapter else name):
        return Named(name, base, adapter, alias)
    raise adapters.missing(session, caller, name, param=param)
