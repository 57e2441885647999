"""The cpu queue: whatever needs no GPU. One look does all there is to do."""

from typing import Any

import structlog
from celery.signals import worker_ready, worker_shutting_down

from app import db
from app.files.service import CPU_QUEUE
from worker.celery import celery
from worker.services import Services, services
from worker.tasks import evaluate, gate, prepare, publish, validate

log = structlog.get_logger()

_IN_TURN = (validate.validate_next, prepare.prepare_next, gate.conclude_next, evaluate.evaluate_next)


@celery.task(name="cpu.look")
def look(queue: str) -> None:
    """Validate files, prepare jobs and evaluate until nothing is left. The message carries none of it: rows do."""
    to = services()
    try:
        with to.metrics.look(queue):
            while one_of_each(to):
                pass
    except db.OUTAGE:
        log.warning("look_postponed")  # the relay rings again when the database is back


def one_of_each(to: Services) -> bool:
    """In turn, so that who uploads a thousand files does not keep others' jobs waiting. False when nothing is left."""
    return any([work(to) for work in _IN_TURN if not to.in_hand.is_leaving])  # noqa: C419 - all of them, whatever the first says


@worker_shutting_down.connect
def _leave(**_: object) -> None:
    if services.cache_info().currsize:
        services().in_hand.leave(services().sessions)


@worker_ready.connect
def _publish_bases(sender: Any, **_: object) -> None:
    """A train worker hears this signal too."""
    if any(queue.name == CPU_QUEUE for queue in sender.task_consumer.queues):
        publish.begin(services())
