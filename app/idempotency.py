"""`Idempotency-Key` on every POST: whoever repeats a request with its key gets the answer that the first one got.

The answer is kept in the transaction that did what was asked (docs/decisions/0026): there is no moment in which one is known and
the other is not, whatever dies in between. Only successes are kept: what was refused, or failed, is tried again.
"""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy import delete, func, orm, select, update
from sqlalchemy.dialects.postgresql import insert
from starlette.concurrency import run_in_threadpool

from app import db
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import AppError, BadRequest
from app.models import IdempotentAnswer

log = structlog.get_logger()

HEADER, REPLAYED = "idempotency-key", "idempotent-replayed"
KEPT = timedelta(hours=24)
RETRY_WINDOW = timedelta(minutes=5)  # within it the SDK repeats what it got no answer to, and sends no key
MAX_KEY_LENGTH = 255
MAX_EXPIRED = 1000  # at once, so that the transaction stays short
MAX_BODY_BYTES = 8 * 1024 * 1024  # a longer answer, such as a long stream with logprobs, is not kept
PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Your own name for the request: repeated within 24 hours with the same body, it is answered as the first was.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH, "pattern": "^[!-~]+$"},
}

Told = TypeVar("Told", bound=BaseModel)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class KeyReused(AppError):
    """The key is that of another request."""

    status, type, code, param = 422, "invalid_request_error", "idempotency_key_reused", "Idempotency-Key"


@dataclass(frozen=True)
class Asked:
    """A request with a key. `sha256` is of all that was asked: path and body."""

    key: str
    sha256: str

    @classmethod
    def of(cls, request: Request, body_sha256: str) -> "Asked":
        told = f"{request.url.path}\n{request.url.query}\n{body_sha256}"
        return cls(request.headers[HEADER], hashlib.sha256(told.encode()).hexdigest())


class Replayed(Exception):
    """The request was answered before; `response` is the same answer."""

    def __init__(self, answer: IdempotentAnswer) -> None:
        super().__init__(answer.key)
        assert answer.status is not None and answer.body is not None
        self.response = Response(answer.body, answer.status, {REPLAYED: "true"}, answer.media_type)


class Stream(StreamingResponse):
    """The answer to a POST, told as it comes. One that tells of a failure midway is not kept."""

    has_failed = False


class IdempotentRoute(APIRoute):
    """The class of all public routes. A POST with a key is done once.

    A route that documents its body itself reads it as it comes: only it knows what was asked, and sees to the rest by `once`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        extra = dict(options.get("openapi_extra") or {})
        self._reads_stream = "requestBody" in extra
        if "POST" in (options.get("methods") or ()):
            options["openapi_extra"] = extra | {"parameters": [*extra.get("parameters", ()), PARAMETER]}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_once(request: Request) -> Response:
            if request.method != "POST" or HEADER not in request.headers:
                return await handle(request)
            _require_usable(request.headers[HEADER])
            try:
                if self._reads_stream:
                    return await handle(request)
                body = await request.body()
                return await _handle_once(request, Asked.of(request, hashlib.sha256(body).hexdigest()), handle)
            except Replayed as replayed:
                return replayed.response

        return handle_once


def once(session: orm.Session, caller: Caller, asked: Asked | None, make: Callable[[orm.Session], Told]) -> Told:
    """What `make` tells, which will be the answer; for routes that open their transaction themselves.

    Raises Replayed, KeyReused.
    """
    if asked is None:
        return make(session)
    begin(session, caller, asked)
    told = make(session)
    keep(session, caller, asked, JSONResponse(told.model_dump(mode="json")))
    return told


def begin(session: orm.Session, caller: Caller, asked: Asked) -> None:
    """Take the key for this transaction; who else comes with it waits for the commit. Raises Replayed, KeyReused."""
    row = {"organization_id": caller.organization_id, "project_id": caller.project_id, "key": asked.key}
    taking = insert(IdempotentAnswer).values(id=ids.new("idem_"), request_sha256=asked.sha256, **row)
    if session.execute(taking.on_conflict_do_nothing().returning(IdempotentAnswer.id)).first() is None:
        _require_new(session, caller, asked)


def keep(session: orm.Session, caller: Caller, asked: Asked, response: Response) -> None:
    """Keep the answer with what it tells of, if it is a success."""
    body = bytes(response.body)
    if not 200 <= response.status_code < 300 or len(body) > MAX_BODY_BYTES:
        session.execute(delete(IdempotentAnswer).where(*_of(caller, asked)))
        return
    told = {"status": response.status_code, "media_type": response.media_type, "body": body.decode()}
    session.execute(update(IdempotentAnswer).where(*_of(caller, asked)).values(**told))


def expire(session: orm.Session) -> int:
    """Forget some of what is older than keys are kept. Returns how many."""
    over = select(IdempotentAnswer.id).where(IdempotentAnswer.created_at < func.clock_timestamp() - KEPT)
    first = over.order_by(IdempotentAnswer.created_at).limit(MAX_EXPIRED).with_for_update(skip_locked=True)
    gone = delete(IdempotentAnswer).where(IdempotentAnswer.id.in_(first)).returning(IdempotentAnswer.id)
    return len(session.scalars(gone).all())


async def _handle_once(request: Request, asked: Asked, handle: Handler) -> Response:
    request.state.asked = asked
    caller: Caller = request.state.caller
    sessions: orm.sessionmaker[orm.Session] = request.app.state.sessions
    await run_in_threadpool(_find, sessions, caller, asked)
    response = await handle(request)
    session: orm.Session | None = getattr(request.state, "session", None)
    if session is not None:  # it is committed after this, with what the answer tells of
        # not in the threads that requests share: all of them may wait for the connection that this one holds
        await to_thread.run_sync(keep, session, caller, asked, response, limiter=CapacityLimiter(1))
    elif isinstance(response, Stream):
        response.body_iterator = _kept_at_the_end(response.body_iterator, response, sessions, caller, asked)
    else:
        await run_in_threadpool(_keep_alone, sessions, caller, asked, response)
    return response


async def _kept_at_the_end(
    chunks: AsyncIterable[Any], response: Stream, sessions: orm.sessionmaker[orm.Session], caller: Caller, asked: Asked
) -> AsyncIterator[Any]:
    """What is streamed, and once it has been told whole, it is kept. A client who leaves early may ask again."""
    told = bytearray()
    async for chunk in chunks:
        if len(told) <= MAX_BODY_BYTES:  # more would not be kept
            told += chunk.encode() if isinstance(chunk, str) else chunk
        yield chunk
    if response.has_failed:
        return
    whole = Response(bytes(told), response.status_code, media_type=response.media_type)
    try:
        await run_in_threadpool(_keep_alone, sessions, caller, asked, whole)
    except (Replayed, KeyReused):
        pass  # another was sooner
    except Exception as error:  # whatever it is, it is no fault of what has been told
        log.warning("answer_not_kept", error=type(error).__name__)


def _find(sessions: orm.sessionmaker[orm.Session], caller: Caller, asked: Asked) -> None:
    """Raises Replayed, KeyReused."""
    with db.organization_session(sessions, caller.organization_id) as session:
        _require_new(session, caller, asked)


def _keep_alone(sessions: orm.sessionmaker[orm.Session], caller: Caller, asked: Asked, response: Response) -> None:
    """Of a request whose route has no transaction: done twice at once, it is as if done once.

    Raises Replayed with the answer that came first, and KeyReused.
    """
    with db.organization_session(sessions, caller.organization_id) as session:
        begin(session, caller, asked)
        keep(session, caller, asked, response)


def _require_new(session: orm.Session, caller: Caller, asked: Asked) -> None:
    answer = session.scalar(select(IdempotentAnswer).where(*_of(caller, asked)))
    if answer is None:
        return
    if answer.request_sha256 != asked.sha256:
        raise KeyReused(
            f"the Idempotency-Key {asked.key!r} belongs to another request, made at {answer.created_at:%Y-%m-%d %H:%M:%S} UTC; "
            "send this one with a key of its own"
        )
    raise Replayed(answer)


def _of(caller: Caller, asked: Asked) -> tuple[Any, ...]:
    is_its = IdempotentAnswer.project_id == caller.project_id, IdempotentAnswer.key == asked.key
    return IdempotentAnswer.organization_id == caller.organization_id, *is_its


def _require_usable(key: str) -> None:
    if not 0 < len(key) <= MAX_KEY_LENGTH or not all("!" <= letter <= "~" for letter in key):
        message = f"the Idempotency-Key must be 1 to {MAX_KEY_LENGTH} visible ASCII characters, such as a UUID"
        raise BadRequest(message, param="Idempotency-Key", code="invalid_idempotency_key")
