"""What routes ask for. Below them there are only arguments."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Annotated

from fastapi import Depends, Header, Request
from sqlalchemy import orm

from app import db, idempotency
from app.accounts import caller
from app.core import crash
from app.core.catalog import Catalog
from app.core.prices import PriceBook
from app.core.settings import Settings as AppSettings
from app.core.storage import Storage as AppStorage

Opening = Callable[[], orm.Session]


def get_caller(request: Request) -> caller.Caller:
    """Whoever the middleware found behind the key."""
    found: caller.Caller = request.state.caller
    return found


Caller = Annotated[caller.Caller, Depends(get_caller)]


def get_is_retry(x_stainless_retry_count: Annotated[int, Header(include_in_schema=False)] = 0) -> bool:
    """Whether the SDK repeats a request that it got no answer to, which may have been carried out."""
    return x_stainless_retry_count > 0


IsRetry = Annotated[bool, Depends(get_is_retry)]


def get_opening(request: Request, caller: Caller) -> Iterator[Opening]:
    """One request, one transaction of one organization: commit if the route returns, roll back if it raises.

    It begins when the route opens it. Repeated with the Idempotency-Key of an earlier request, it does not begin.
    """

    def open_session() -> orm.Session:
        session = stack.enter_context(db.organization_session(request.app.state.sessions, caller.organization_id))
        if asked := getattr(request.state, "asked", None):
            idempotency.begin(session, caller, asked)
        request.state.session = session
        return session

    with ExitStack() as stack:
        yield open_session
        if request.method == "POST":
            crash.point("post_uncommitted")
    if request.method == "POST":
        crash.point("post_committed")


# scope="function" commits before the answer leaves; FastAPI's default answers 200 first, whatever the commit says
OpenSession = Annotated[Opening, Depends(get_opening, scope="function")]  # for routes that do not always need one


async def get_turn(request: Request) -> AsyncIterator[None]:
    """Let no more requests hold a transaction than there are connections to keep.

    Between opening it and the route a request waits for a thread, and those who wait for its connection may have all of them.
    """
    async with request.app.state.turns:
        yield


Turn = Annotated[None, Depends(get_turn, scope="function")]


def get_session(_turn: Turn, open_session: OpenSession) -> orm.Session:
    return open_session()


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
