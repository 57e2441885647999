"""Spans for OpenTelemetry, if a collector is set; if not, nothing is imported and nothing done.

A trace goes from process to process as a W3C traceparent: in headers, and through the database in rows. Attributes are ids,
counts and names of ours. Text of customers is never put there, so an exception leaves its type and not its message.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.core.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

HEADER = "traceparent"
Value = str | int | float | bool

_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None  # one for a process, as of loggers


class Span:
    """What is under way. Its attributes may become known later."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.attributes: dict[str, Value] = {}

    def set(self, **attributes: Value) -> None:
        self.attributes |= attributes


def configure(service: str, settings: TracingSettings) -> None:
    """Send this process's spans to the collector, if there is one. What is left goes there when the process ends in order."""
    global _provider, _tracer  # noqa: PLW0603  # as structlog keeps its configuration
    if settings.endpoint is None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource.create({"service.name": f"tunesmith-{service}"})
    _provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(settings.share)), resource=resource)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{settings.endpoint}/v1/traces")))
    _tracer = _provider.get_tracer("tunesmith")


def close() -> None:
    """Send what is left, where the process ends by a signal. Blocks."""
    if _provider is not None:
        _provider.shutdown()


@contextmanager
def span(name: str, *, parent: str | None = None, **attributes: Value) -> Iterator[Span]:
    """What the block does, as a part of the trace of `parent`, a traceparent, or else of what is under way here."""
    made = Span(name)
    made.set(**attributes)
    if _tracer is None:
        yield made
        return
    from opentelemetry.trace import StatusCode

    with _tracer.start_as_current_span(
        name, context=_context(parent), record_exception=False, set_status_on_exception=False
    ) as started:
        try:
            yield made
        except BaseException as error:
            started.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            started.update_name(made.name)
            started.set_attributes(made.attributes)


def record(name: str, began_at: float, ended_at: float, *, parent: str | None = None, **attributes: Value) -> None:
    """As `span`, of what is over and was between two instants of `time.perf_counter`."""
    if _tracer is None:
        return
    offset_seconds = time.time() - time.perf_counter()
    start, end = (int((instant + offset_seconds) * 1e9) for instant in (began_at, ended_at))
    _tracer.start_span(name, context=_context(parent), start_time=start, attributes=attributes).end(end)


def current() -> str | None:
    """The traceparent of what is under way, for whoever goes on with it."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = dict[str, str]()
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(HEADER)


def headers() -> dict[str, str]:
    """Those that carry the trace into a request."""
    found = current()
    return {HEADER: found} if found else {}


def _context(parent: str | None) -> "Context | None":
    """What cannot be read begins a trace of its own."""
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: parent})
