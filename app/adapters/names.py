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
    if adapter := adapters.find(session, caller, name):
        return _tuned(catalog, adapter, param=param)
    if pointed := aliases.pointed(session, caller, name):
        model, adapter = pointed
        if adapter is not None:
            return _tuned(catalog, adapter, alias=name, param=param)
        if base := catalog.find(model):
            return Named(model, base, alias=name)
    raise adapters.unknown(name, param=param)


def _tuned(catalog: Catalog, adapter: Adapter, *, alias: str | None = None, param: str | None) -> Named:
    base = catalog.find(adapter.base)
    if base is None:
        raise adapters.unknown(adapter.name, param=param)
    return Named(adapter.name, base, adapter, alias)
