"""What happens to every request before a route sees it: an id, a limit, a line in the log."""

import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core import ids
from app.core.errors import TooLarge
from app.handlers import respond

log = structlog.get_logger()

UPLOADS = "/v1/files"


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
                log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=seconds)


class BodyLimit:
    """Refuses a body that is too large before it is read; one without a length is counted as it comes.

    Uploads have a limit of their own, since they stream.
    """

    def __init__(self, app: ASGIApp, *, body_bytes: int, file_bytes: int) -> None:
        self._app, self._body_bytes, self._file_bytes = app, body_bytes, file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._file_bytes if scope["path"] == UPLOADS else self._body_bytes
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
