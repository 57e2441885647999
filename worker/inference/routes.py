"""The private protocol over HTTP: see app.core.engine for its types. Never reachable by customers."""

import asyncio
import contextlib
import hmac
from typing import Any, TypeVar

import structlog
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core import tracing
from app.core.engine import AdapterRef, Chunk, GenerateRequest
from app.core.errors import AppError, BadRequest, Unauthenticated, Unavailable
from worker.inference.driver import EngineDriver
from worker.inference.metrics import AnswerMetrics, EngineMetrics

log = structlog.get_logger()

_Body = TypeVar("_Body", bound=BaseModel)


class EngineError(AppError):
    """The model could not answer."""

    status, type, code = 500, "server_error", "engine_error"


def create_app(driver: EngineDriver, *, token: str, metrics: EngineMetrics | None = None, metrics_token: str = "") -> ASGIApp:
    """Raises ValueError without a token: an engine that answers anyone is never meant. `metrics_token` opens `/metrics` alone."""
    if not token:
        raise ValueError("an engine needs a token: set TUNESMITH_ENGINE_TOKEN")
    app = Starlette(
        routes=[
            Route("/generate", _generate, methods=["POST"]),
            Route("/blend", _generate, methods=["POST"]),
            Route("/prefetch", _prefetch, methods=["POST"]),
            Route("/stats", _stats),
            Route("/metrics", _metrics),
            Route("/healthz", _healthz),
        ],
        exception_handlers={AppError: _refuse, Exception: _break},
    )
    app.state.driver, app.state.metrics = driver, metrics or EngineMetrics()
    app.state.metrics.watch(driver.stats)
    return _TokenRequired(app, token, metrics_token)


async def _generate(request: Request) -> "Answer":
    wanted = _parse(GenerateRequest, await request.body())
    measured = _measured(request).answering(len(wanted.prompt))
    return Answer(_driver(request), wanted, measured, trace=request.headers.get(tracing.HEADER))


async def _prefetch(request: Request) -> Response:
    """Answers when the adapter is loaded."""
    ref = _parse(AdapterRef, await request.body())
    await _driver(request).prefetch(ref)
    return JSONResponse({"adapter": ref.internal_name})


async def _stats(request: Request) -> Response:
    return JSONResponse(_driver(request).stats().model_dump(mode="json"))


async def _metrics(request: Request) -> Response:
    return Response(_measured(request).text(), media_type=CONTENT_TYPE_LATEST)


async def _healthz(request: Request) -> Response:
    is_draining = _driver(request).is_draining
    return JSONResponse({"status": "draining" if is_draining else "ok"}, status_code=503 if is_draining else 200)


def _driver(request: Request) -> EngineDriver:
    driver: EngineDriver = request.app.state.driver
    return driver


def _measured(request: Request) -> EngineMetrics:
    metrics: EngineMetrics = request.app.state.metrics
    return metrics


def _parse(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise BadRequest(first["msg"], param=".".join(str(part) for part in first["loc"]) or None) from None


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AppError)
    return _envelope(error)


async def _break(_request: Request, _error: Exception) -> Response:
    return _envelope(EngineError("the engine failed; its log says why"))


def _envelope(error: AppError) -> JSONResponse:
    return JSONResponse(error.envelope(), status_code=error.status, headers=error.headers)


class Answer:
    """Lines of JSON while the model speaks. All that the request holds is given back when it ends or its client leaves.

    The status is chosen with the first chunk, so that whatever fails before it is an HTTP error.
    """

    def __init__(self, driver: EngineDriver, wanted: GenerateRequest, metrics: AnswerMetrics, *, trace: str | None) -> None:
        self._driver, self._wanted, self._metrics, self._trace = driver, wanted, metrics, trace

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._traced(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_left = not answering.done()
            leaving.cancel()
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        if has_left:
            self._metrics.left()
            log.info("client_left", request_id=self._wanted.request_id)

    async def _traced(self, send: Send) -> None:
        with tracing.span("chat", parent=self._trace, request_id=self._wanted.request_id):
            await self._answer(send)

    async def _answer(self, send: Send) -> None:
        async with contextlib.AsyncExitStack() as held:
            with tracing.span("adapters", count=len(self._wanted.shares)):
                leases = await held.enter_async_context(self._driver.holding(self._wanted))
            chunks = await held.enter_async_context(contextlib.aclosing(self._driver.stream(self._wanted, leases)))
            first = await anext(chunks)
            self._metrics.note(first)
            if first.error is not None:  # of one that leaves, whatever it is: nothing was said, and another engine may answer
                raise Unavailable(first.error, code="engine_draining") if self._driver.is_draining else EngineError(first.error)
            headers = [(b"content-type", b"application/x-ndjson")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send(_line(first))
            last = first
            async for last in chunks:
                self._metrics.note(last)
                await send(_line(last))
            await send({"type": "http.response.body", "body": b""})
            self._log(last)

    def _log(self, last: Chunk) -> None:
        log.info(
            "answered",
            request_id=self._wanted.request_id,
            adapters=[share.adapter.internal_name for share in self._wanted.shares],
            prompt_tokens=len(self._wanted.prompt),
            completion_tokens=last.completion_tokens,
            finish_reason=last.finish_reason,
            error=last.error,
        )


def _line(chunk: Chunk) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk.model_dump_json().encode() + b"\n", "more_body": True}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _TokenRequired:
    """Turns strangers away before anything of theirs is read. Only the health check is open."""

    def __init__(self, app: ASGIApp, token: str, metrics_token: str) -> None:
        self._app, self._token, self._metrics_token = app, token, metrics_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            given = dict(scope["headers"]).get(b"authorization", b"")
            accepted = [self._token, *([self._metrics_token] if self._metrics_token and scope["path"] == "/metrics" else ())]
            if not any(hmac.compare_digest(given, f"Bearer {token}".encode()) for token in accepted):
                await _envelope(Unauthenticated("this is an engine's private address"))(scope, receive, send)
                return
        await self._app(scope, receive, send)
