"""The train queues: one job at a time, claimed from rows."""

from functools import cache
from typing import Any

from celery.signals import worker_ready, worker_shutdown, worker_shutting_down

from worker.celery import celery
from worker.metrics import process_id
from worker.services import services
from worker.supervisor import Supervisor


@cache
def supervisor() -> Supervisor:
    """This worker's own."""
    return Supervisor(services(), owner=process_id())


@celery.task(name="train.look")
def look(queue: str) -> None:
    """Claim and run jobs of this queue until none is left."""
    with services().metrics.look(queue):
        supervisor().run_all(queue)


@worker_ready.connect
def _warm_up(sender: Any, **_: object) -> None:
    """While the worker waits, its next trainer imports torch and loads the base. A cpu worker hears this signal too."""
    if any(queue.name.startswith("train.") for queue in sender.task_consumer.queues):
        supervisor().warm_up()


@worker_shutting_down.connect  # fires in Celery's main process only: with the threads pool, that is here
def _drain(**_: object) -> None:
    if supervisor.cache_info().currsize:
        supervisor().drain()


@worker_shutdown.connect
def _close(**_: object) -> None:
    if supervisor.cache_info().currsize:
        supervisor().close()
