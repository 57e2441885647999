"""How things stand in the database, as metrics: told by the relay alone, so that a sum over processes counts nothing twice."""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import orm

from app import standing
from app.core.metrics import gauge
from app.standing import Standing

log = structlog.get_logger()

FRESH_SECONDS = 5.0  # so that many who ask cost the database no more than one
STATEMENT_SECONDS = 3  # Prometheus waits for ten in all


class StandingCollector(Collector):
    """Reads when it is asked. While the database is away it tells that, and nothing else."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], *, engine_timeout_seconds: float) -> None:
        self._sessions, self._engine_timeout_seconds = sessions, engine_timeout_seconds
        self._lock = threading.Lock()
        self._read: Standing | None = None
        self._read_at = -math.inf

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            found = self._current()
        yield gauge("tunesmith_database_up", "Whether the database answers the relay", values=[((), float(found is not None))])
        if found is not None:
            yield from families(found)

    def _current(self) -> Standing | None:
        if time.monotonic() - self._read_at < FRESH_SECONDS:
            return self._read
        try:
            with self._sessions.begin() as session:
                self._read = standing.read(session, engine_timeout_seconds=self._engine_timeout_seconds)
        except Exception as error:  # whatever it is, what the relay measures of itself is told all the same
            log.warning("standing_unknown", error=type(error).__name__)
            self._read = None
        self._read_at = time.monotonic()
        return self._read


def families(found: Standing) -> Iterator[Metric]:
    queues, webhooks = found.queues.items(), found.webhooks
    yield gauge("tunesmith_jobs", "Jobs", ("state",), [((state,), count) for state, count in found.jobs.items()])
    yield CounterMetricFamily("tunesmith_job_attempts", "Attempts at all jobs", value=found.attempts)
    yield gauge("tunesmith_leases_expired", "Running jobs whose worker is silent", values=[((), found.leases_expired)])
    yield gauge("tunesmith_queue_depth", "What may be claimed now", ("queue",), [((name,), each.count) for name, each in queues])
    yield gauge(
        "tunesmith_queue_oldest_seconds",
        "For how long the oldest of it has been claimable",
        ("queue",),
        [((name,), each.oldest_seconds) for name, each in queues],
    )
    yield gauge("tunesmith_outbox_depth", "Messages that are due", values=[((), found.outbox.count)])
    yield gauge(
        "tunesmith_outbox_oldest_seconds", "For how long the oldest of them is", values=[((), found.outbox.oldest_seconds)]
    )
    yield gauge("tunesmith_webhooks_waiting", "Deliveries that will be tried", values=[((), webhooks.waiting)])
    yield gauge("tunesmith_webhooks_oldest_due_seconds", "For how long one is due", values=[((), webhooks.due.oldest_seconds)])
    yield gauge("tunesmith_webhooks_exhausted", "Deliveries whose last try failed", values=[((), webhooks.exhausted)])
    yield gauge("tunesmith_webhook_endpoints_disabled", "Endpoints switched off", values=[((), webhooks.disabled_endpoints)])
    yield _engines(found)
    yield _processes(found)


def _engines(found: Standing) -> GaugeMetricFamily:
    live = Counter((engine.base, engine.quantization) for engine in found.engines)
    return gauge("tunesmith_engines_live", "Engines heard of lately", ("base", "quantization"), live.items())


def _processes(found: Standing) -> GaugeMetricFamily:
    """Those of a kind that has none are told as 0: what is not there cannot be alarmed about."""
    live = Counter({(kind,): 0 for kind in ("relay", "cpu", "train")})
    live.update((process.kind,) for process in found.processes)
    return gauge("tunesmith_processes_live", "Relays and workers heard of lately", ("kind",), live.items())
