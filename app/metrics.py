"""What the API measures of itself, and the route that tells Prometheus. No customer is named: organizations are not labels."""

import hmac
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.errors import AppError, Unauthenticated
from app.core.metrics import SECONDS, new_registry

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # a client may invent others
UNKNOWN = "(none)"  # the route of what was refused before it had one
CLIENT_LEFT = 499  # the status of what nobody waited for

router = APIRouter(include_in_schema=False)


class HttpMetrics:
    """Of requests. Routes are templates such as `/v1/files/{file_id}`, so that there are as many series as routes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        of = ("method", "route")
        self.requests = Counter("tunesmith_http_requests", "Requests answered", (*of, "status"), registry=registry)
        self.seconds = Histogram(
            "tunesmith_http_request_seconds",
            "From a request's first byte to the last of its answer",
            of,
            buckets=(*SECONDS, 120.0, 900.0),  # streams and uploads take minutes
            registry=registry,
        )
        self.in_flight = Gauge("tunesmith_http_requests_in_flight", "Requests being answered", registry=registry)
        self.received = Counter("tunesmith_http_request_bytes", "Bytes of bodies read", of, registry=registry)
        self.sent = Counter("tunesmith_http_response_bytes", "Bytes of bodies sent", of, registry=registry)


class GatewayMetrics:
    """Of chat and completions, as customers see them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter("tunesmith_gateway_tokens", "Tokens read and written", ("base", "direction"), registry=registry)
        self.first_token_seconds = Histogram(
            "tunesmith_gateway_first_token_seconds",
            "Until an engine's first token",
            ("base",),
            buckets=SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "tunesmith_gateway_rejections", "Requests for text that were refused or broke off", ("reason",), registry=registry
        )

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        try:
            yield
        except AppError as error:
            self.rejections.labels(error.code or error.type).inc()
            raise

    def answered(self, base: str, *, prompt_tokens: int, completion_tokens: int, first_token_seconds: float | None) -> None:
        self.tokens.labels(base, "in").inc(prompt_tokens)
        self.tokens.labels(base, "out").inc(completion_tokens)
        if first_token_seconds is not None:
            self.first_token_seconds.labels(base).observe(first_token_seconds)


class ApiMetrics:
    """All of one API process."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.http = HttpMetrics(self.registry)
        self.gateway = GatewayMetrics(self.registry)


class Measured:
    """The outermost layer: counts and times every request, those that are refused early too."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, received, sent, began = 0, 0, 0, time.perf_counter()

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, counted_receive, counted_send)
            finally:
                self._count(scope, status, received, sent, time.perf_counter() - began)

    def _count(self, scope: Scope, status: int, received: int, sent: int, seconds: float) -> None:
        of = scope["method"] if scope["method"] in METHODS else "other", route_of(scope)
        self._metrics.requests.labels(*of, str(status or CLIENT_LEFT)).inc()
        self._metrics.seconds.labels(*of).observe(seconds)
        self._metrics.received.labels(*of).inc(received)
        self._metrics.sent.labels(*of).inc(sent)


def route_of(scope: Scope) -> str:
    """The template of the route that was found, never a path with ids in it."""
    route: Any = scope.get("route")
    return getattr(route, "path", UNKNOWN)


@router.get("/metrics")
async def read_metrics(request: Request) -> Response:
    """For Prometheus, which knows the token. Without one set there is no such place."""
    state = request.app.state
    token = state.settings.metrics.token.get_secret_value()
    if not token:
        raise HTTPException(404, "Not Found")
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        raise Unauthenticated("send the token of TUNESMITH_METRICS__TOKEN as a bearer")
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
