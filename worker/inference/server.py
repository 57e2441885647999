"""The private HTTP face of an engine (see app.core.engine). `python -m worker.inference.server` reads the settings and serves."""

import asyncio
import contextlib
import hmac
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import structlog
import torch
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core import catalog, logging
from app.core.engine import AdapterRef, Chunk, GenerateRequest
from app.core.errors import AppError, BadRequest, Unauthenticated
from app.core.settings import Settings
from app.core.storage import open_storage
from worker.inference import native
from worker.inference.announce import advertised_url, announce
from worker.inference.driver import EngineDriver
from worker.model import base as bases

log = structlog.get_logger()

LAST_BYTES_SECONDS = 10  # what a slow reader gets after the engine has nothing left to do

_Body = TypeVar("_Body", bound=BaseModel)


class EngineError(AppError):
    """The model could not answer."""

    status, type, code = 500, "server_error", "engine_error"


def create_app(driver: EngineDriver, *, token: str) -> ASGIApp:
    """Raises ValueError without a token: an engine that answers anyone is never meant."""
    if not token:
        raise ValueError("an engine needs a token: set TUNESMITH_ENGINE_TOKEN")
    app = Starlette(
        routes=[
            Route("/generate", _generate, methods=["POST"]),
            Route("/prefetch", _prefetch, methods=["POST"]),
            Route("/stats", _stats),
            Route("/healthz", _healthz),
        ],
        exception_handlers={AppError: _refuse},
    )
    app.state.driver = driver
    return _TokenRequired(app, token)


async def _generate(request: Request) -> "Answer":
    return Answer(_driver(request), _parse(GenerateRequest, await request.body()))


async def _prefetch(request: Request) -> Response:
    """Answers when the adapter is loaded."""
    ref = _parse(AdapterRef, await request.body())
    driver = _driver(request)
    driver.release(await driver.ensure(ref))
    return JSONResponse({"adapter": ref.internal_name})


async def _stats(request: Request) -> Response:
    return JSONResponse(_driver(request).stats().model_dump(mode="json"))


async def _healthz(request: Request) -> Response:
    is_draining = _driver(request).is_draining
    return JSONResponse({"status": "draining" if is_draining else "ok"}, status_code=503 if is_draining else 200)


def _driver(request: Request) -> EngineDriver:
    driver: EngineDriver = request.app.state.driver
    return driver


def _parse(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise BadRequest(first["msg"], param=".".join(str(part) for part in first["loc"]) or None) from None


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, AppError)
    return _envelope(error)


def _envelope(error: AppError) -> JSONResponse:
    body = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    seconds = getattr(error, "retry_after_seconds", None)
    return JSONResponse({"error": body}, status_code=error.status, headers={"Retry-After": str(seconds)} if seconds else None)


class Answer:
    """Lines of JSON while the model speaks. All that the request holds is given back when it ends or its client leaves.

    The status is chosen with the first chunk, so that whatever fails before it is an HTTP error.
    """

    def __init__(self, driver: EngineDriver, wanted: GenerateRequest) -> None:
        self._driver, self._wanted = driver, wanted

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(send))
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
            log.info("client_left", request_id=self._wanted.request_id)

    async def _answer(self, send: Send) -> None:
        lease = await self._driver.ensure(self._wanted.adapter) if self._wanted.adapter else None
        try:
            async with contextlib.aclosing(self._driver.stream(self._wanted, lease)) as chunks:
                first = await anext(chunks)
                if first.error is not None:
                    raise EngineError(first.error)
                headers = [(b"content-type", b"application/x-ndjson")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send(_line(first))
                async for chunk in chunks:
                    await send(_line(chunk))
                await send({"type": "http.response.body", "body": b""})
        finally:
            if lease:
                self._driver.release(lease)


def _line(chunk: Chunk) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk.model_dump_json().encode() + b"\n", "more_body": True}


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _TokenRequired:
    """Turns strangers away before anything of theirs is read. Only the health check is open."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await _envelope(Unauthenticated("this is an engine's private address"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class DrainingServer(uvicorn.Server):
    """The first signal drains: new requests get 503 while running ones finish. The second one leaves at once."""

    def __init__(self, config: uvicorn.Config, driver: EngineDriver) -> None:
        super().__init__(config)
        self._driver = driver
        self._draining: asyncio.Task[None] | None = None
        self.announcing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._start_draining, signal.Signals(sig).name)

    def _start_draining(self, reason: str) -> None:
        if not self._draining:
            self._draining = asyncio.create_task(self._drain(reason))

    async def _drain(self, reason: str) -> None:
        log.info("engine_draining", signal=reason)
        if self.announcing:
            self.announcing.cancel()
        await self._driver.drain()
        self.should_exit = True


async def serve(settings: Settings, base: bases.LoadedBase, card: Path) -> None:
    """Answer until told to leave."""
    storage = open_storage(settings.storage)
    token = settings.engine_token.get_secret_value()
    driver = native.open_driver(base, storage, cache_dir=settings.cache_dir, settings=settings.inference)
    try:
        app = create_app(driver, token=token)
        listener = _listen(settings.inference.host, settings.inference.port)
        url = advertised_url(settings.inference.host, listener.getsockname()[1], settings.inference.gateway_url)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=LAST_BYTES_SECONDS)
        server = DrainingServer(config, driver)
        beats = announce(driver, storage, card=card, url=url, token=token, settings=settings.inference)
        server.announcing = asyncio.create_task(beats)
        log.info("engine_listening", url=url, base=base.entry.id, base_digest=base.entry.digest)
        await server.serve(sockets=[listener])
    finally:
        driver.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)  # before the first heartbeat: whoever hears it may call
    return listener


def main() -> None:
    settings = Settings()
    logging.configure("engine", format=settings.log_format, level=settings.log_level)
    wanted = catalog.load(settings.catalog_file).resolve(settings.inference.base)
    if torch.get_num_threads() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            torch.get_num_threads() // 2
        )  # two threads waiting for each other on a busy core are slower than one
    base = bases.load(wanted, settings.cache_dir, for_training=False)
    asyncio.run(serve(settings, base, bases.card(wanted, settings.cache_dir)))


if __name__ == "__main__":
    main()
