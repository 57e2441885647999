"""What relays and workers measure, and the port where they tell it."""

import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.core import events
from app.core.metrics import LONG_SECONDS, SECONDS, at_zero, gauge, new_registry
from app.core.settings import MetricsSettings
from app.outbox import Topic
from worker.broker import polls

log = structlog.get_logger()

Outcome = Literal["succeeded", "refused", "stopped", "broken", "lease_lost", "database_lost"]


def process_id() -> str:
    """Names host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def serve(settings: MetricsSettings, registry: CollectorRegistry) -> None:
    """Answer Prometheus from a thread, if a port is set. One that is taken stops nobody's work."""
    if not settings.port:
        return
    try:
        start_http_server(settings.port, settings.host, registry)
    except OSError as error:
        log.error("metrics_not_served", host=settings.host, port=settings.port, error=str(error))


class WorkerMetrics:
    """Of a worker process. An attempt that was `refused` will never do; a `broken` one goes back to the queue."""

    def __init__(self) -> None:
        self.registry = new_registry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        new_gauge = partial(Gauge, registry=self.registry)
        new_gauge(
            "tunesmith_worker_broker_silence_seconds", "Since the broker last answered a poll; 0 while a look is at work"
        ).set_function(lambda: polls.silent_seconds)
        self.looks = counter("tunesmith_worker_looks", "Rings that were heard", ("queue",))
        self.attempts_started = counter("tunesmith_worker_attempts_started", "Attempts at jobs that were begun")
        self.attempts_ended = counter("tunesmith_worker_attempts_ended", "Attempts at jobs that are over", ("outcome",))
        at_zero(self.attempts_ended, get_args(Outcome))
        self.checkpoint_seconds = histogram(
            "tunesmith_worker_checkpoint_upload_seconds", "To bring a checkpoint to storage", buckets=LONG_SECONDS
        )
        self.steps = counter("tunesmith_worker_steps", "Optimizer steps")
        self.tokens = counter("tunesmith_worker_trained_tokens", "Tokens of those steps")
        self.peak_bytes = new_gauge(
            "tunesmith_worker_trainer_peak_bytes", "The most that the last trainer has had", ("measured_as",)
        )

    def watch_disk(self, **folders: Path) -> None:
        """How much is free under each, or where it is to be made."""
        free = Gauge("tunesmith_worker_disk_free_bytes", "Free for us", ("folder",), registry=self.registry)
        for name, folder in folders.items():
            free.labels(name).set_function(partial(_free_bytes, folder))

    def note(self, event: events.Event) -> None:
        """What a trainer says."""
        match event:
            case events.Stepped():
                self.steps.inc()
                self.tokens.inc(event.tokens)
            case events.Finished(memory=memory):
                self.peak_bytes.labels(memory.measured_as).set(memory.peak_bytes)

    @contextmanager
    def look(self, queue: str) -> Iterator[None]:
        self.looks.labels(queue).inc()
        polls.look_begins()
        try:
            yield
        finally:
            polls.look_ends()


def _free_bytes(folder: Path) -> float:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return float(shutil.disk_usage(there).free)


class RelayMetrics:
    """Of one relay process. `loops` are the names of what it does."""

    def __init__(self, loops: Iterable[str]) -> None:
        self.registry = new_registry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.loops = Ages("tunesmith_relay_loop_age_seconds", "Since this loop last came through", "loop", of=loops)
        self.broker = Ages("tunesmith_relay_broker_age_seconds", "Since this was last done", "what", of=("rang", "reached"))
        self.registry.register(self.loops)
        self.registry.register(self.broker)
        self.rings = counter("tunesmith_relay_rings", "Rings sent to workers", ("queue", "result"))
        self.reaped = counter("tunesmith_relay_leases_reaped", "Jobs that were taken from a silent worker")
        self.messages = counter("tunesmith_relay_outbox_messages", "Messages of the outbox acted on", ("topic", "result"))
        at_zero(self.messages, Topic, ("done", "again"))
        self.deliveries = histogram(
            "tunesmith_relay_delivery_seconds", "Attempts to deliver a webhook", ("result",), buckets=SECONDS
        )
        at_zero(self.deliveries, ("delivered", "failed"))

    def rang(self, queue: str, *, is_heard: bool) -> None:
        self.rings.labels(queue, "heard" if is_heard else "failed").inc()
        if is_heard:
            self.broker.note("rang")
            self.broker.note("reached")

    def attempted(self, *, is_delivered: bool, seconds: float) -> None:
        self.deliveries.labels("delivered" if is_delivered else "failed").observe(seconds)


class Ages(Collector):
    """How long ago each of some things last happened, or we began."""

    def __init__(self, name: str, help: str, label: str, *, of: Iterable[str]) -> None:
        self._name, self._help, self._label = name, help, label
        self._at = dict.fromkeys(of, time.monotonic())

    def note(self, what: str) -> None:
        self._at[what] = time.monotonic()

    def since(self, what: str) -> float:
        return time.monotonic() - self._at[what]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield gauge(self._name, self._help, (self._label,), [((what,), self.since(what)) for what in self._at])
