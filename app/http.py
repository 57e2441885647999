"""What happens to every request before a route sees it: an id, a limit, a line in the log."""

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core import ids, tracing
from app.core.errors import TooLarge
from app.core.settings import LimitSettings
from app.handlers import respond
from app.metrics import route_of

log = structlog.get_logger()

FILES, PARTS = "/v1/files", re.compile("/v1/uploads/[^/]+/parts")
EVERY_FEW_SECONDS = ("/internal/engines", "/healthz", "/readyz")  # asked by machines; what is wrong they tell themselves
FORM_BYTES = 64 * 1024  # what a form adds to a part


class RequestContext:
    """Gives the request an id, binds it to every log line, and turns what nobody caught into an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = ids.new("req_")
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                log.info("client_left")
            except Exception as error:  # the last wall: FastAPI's handlers have had their turn
                if status:
                    log.error("response_broken_off", exc_info=error)
                    raise
                await respond(error, scope, receive, send_with_id)
            finally:
                seconds = round(time.perf_counter() - started, 4)
                say = log.debug if scope["path"].startswith(EVERY_FEW_SECONDS) else log.info
                say("request", method=scope["method"], path=scope["path"], status=status, seconds=seconds)


class Traced:
    """A span for every request of a customer, in the trace that its traceparent names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        parent, request_id = Headers(scope=scope).get(tracing.HEADER), scope["state"]["request_id"]
        with tracing.span("request", parent=parent, method=scope["method"], request_id=request_id) as span:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set(status=message["status"])
                await send(message)

            try:
                await self._app(scope, receive, send_and_note)
            finally:
                span.name = f"{scope['method']} {route_of(scope)}"
                span.set(route=route_of(scope))


class BodyLimit:
    """Refuses a body that is too large before it is read; one without a length is counted as it comes.

    Files and parts of them have limits of their own, since they stream.
    """

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["path"])
        error = TooLarge(f"the body is over the limit of {limit} bytes")
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            await respond(error, scope, receive, send)
            return
        read_bytes = 0

        async def counted() -> Message:
            nonlocal read_bytes
            message = await receive()
            read_bytes += len(message.get("body", b""))
            if read_bytes > limit:
                # of all exceptions that come up while a body is read, FastAPI lets only its own kind through
                raise HTTPException(error.status, str(error))
            return message

        await self._app(scope, counted, send)

    def _limit_of(self, path: str) -> int:
        if path == FILES:
            return self._limits.file_bytes
        return self._limits.part_bytes + FORM_BYTES if PARTS.fullmatch(path) else self._limits.body_bytes
