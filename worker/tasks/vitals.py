"""What a worker process tells of itself beside its work: metrics, and that it lives."""

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import structlog
from celery.signals import worker_ready, worker_shutdown

from app import processes
from app.core import tracing
from app.files.service import CPU_QUEUE
from worker import metrics
from worker.broker import polls
from worker.services import Services, services

log = structlog.get_logger()


class Beat:
    """Says every few seconds that this process lives, from a thread. A database that is away misses it for so long.

    While a look is at work nobody asks the broker, and its answer counts as of now."""

    def __init__(self, to: Services, kind: str, queues: Sequence[str]) -> None:
        self._to, self._kind, self._queues = to, kind, queues
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="vitals", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set():
            self._beat()
            self._is_over.wait(processes.BEAT_SECONDS)

    def _beat(self) -> None:
        mine, silent_seconds = metrics.process_id(), polls.silent_seconds
        try:
            with self._to.sessions.begin() as session:
                processes.record(session, mine, kind=self._kind, queues=self._queues, broker_seconds=silent_seconds)
        except Exception as error:  # a thread that ends here would tell of a worker that is gone
            log.warning("vitals_not_told", error=type(error).__name__)


@worker_ready.connect
def _begin(sender: Any, **_: object) -> None:
    """Celery says so again after each reconnect."""
    _begin_once(tuple(sorted(queue.name for queue in sender.task_consumer.queues)))


@cache
def _begin_once(queues: tuple[str, ...]) -> None:
    to, kind = services(), "cpu" if CPU_QUEUE in queues else "train"
    tracing.configure(kind, to.settings.tracing)
    to.metrics.watch_disk(work=to.settings.work_dir, cache=to.settings.cache_dir)
    metrics.serve(to.settings.metrics, to.metrics.registry)
    beat = Beat(to, kind, queues)
    worker_shutdown.connect(lambda **_: beat.stop(), weak=False)
