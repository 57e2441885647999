"""What routes ask for. Below them there are only arguments."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import orm

from app import db
from app.accounts import caller
from app.core.catalog import Catalog
from app.core.prices import PriceBook
from app.core.settings import Settings as AppSettings
from app.core.storage import Storage as AppStorage


def get_caller(request: Request) -> caller.Caller:
    """Whoever the middleware found behind the key."""
    found: caller.Caller = request.state.caller
    return found


Caller = Annotated[caller.Caller, Depends(get_caller)]


def get_session(request: Request, caller: Caller) -> Iterator[orm.Session]:
    """One request, one transaction of one organization: commit if the route returns, roll back if it raises."""
    with db.organization_session(request.app.state.sessions, caller.organization_id) as session:
        yield session


# scope="function" commits before the answer leaves; FastAPI's default answers 200 first, whatever the commit says
Session = Annotated[orm.Session, Depends(get_session, scope="function")]


def get_sessions(request: Request) -> orm.sessionmaker[orm.Session]:
    sessions: orm.sessionmaker[orm.Session] = request.app.state.sessions
    return sessions


def get_settings(request: Request) -> AppSettings:
    settings: AppSettings = request.app.state.settings
    return settings


def get_storage(request: Request) -> AppStorage:
    storage: AppStorage = request.app.state.storage
    return storage


def get_catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    return catalog


def get_prices(request: Request) -> PriceBook:
    prices: PriceBook = request.app.state.prices
    return prices


Sessions = Annotated[orm.sessionmaker[orm.Session], Depends(get_sessions)]  # for routes that work without a transaction too
Settings = Annotated[AppSettings, Depends(get_settings)]
Storage = Annotated[AppStorage, Depends(get_storage)]
BaseModels = Annotated[Catalog, Depends(get_catalog)]
Prices = Annotated[PriceBook, Depends(get_prices)]
