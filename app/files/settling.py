"""Bytes that were stored, and a row that is to say so: both, or neither."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from fastapi import Request
from sqlalchemy import orm

from app import db, idempotency
from app.accounts.caller import Caller
from app.core import crash
from app.core.errors import Unavailable
from app.core.storage import Storage
from app.files.multipart import Received
from app.idempotency import Asked, Told

log = structlog.get_logger()


def settle(request: Request, caller: Caller, key: str, received: Received, make: Callable[[orm.Session], Told]) -> Told:
    """`make` a row of what a form brought and is stored under `key`; what it tells is the answer, once for an Idempotency-Key.

    In a transaction of its own: none is open while the bytes come in. Raises Replayed, KeyReused.
    """
    state = request.app.state
    asked = Asked.of(request, received.digest) if idempotency.HEADER in request.headers else None
    with settling(state.storage, key):
        with db.organization_session(state.sessions, caller.organization_id) as session:
            told = idempotency.once(session, caller, asked, make)
            crash.point("post_uncommitted")
        crash.point("post_committed")
        return told


@contextmanager
def settling(storage: Storage, key: str) -> Iterator[None]:
    """If the block raises, what was stored under the key goes.

    Unless the database was away: then the commit may have been made all the same, and a row must not lose its bytes.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and db.is_outage(error):
            log.warning("upload_unsettled", key=key)
        else:
            throw_away(storage, key)
        raise


def throw_away(storage: Storage, key: str) -> None:
    """What nothing names. A storage that is away keeps it until a sweep: what went wrong first is what the client hears."""
    try:
        storage.delete(key)
    except Unavailable:
        log.warning("upload_not_deleted", key=key)
