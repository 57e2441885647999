"""The cpu queue: whatever needs no GPU. One look does all there is to do."""

from typing import Any

import structlog
from celery.signals import worker_ready

from app import db
from app.files.service import CPU_QUEUE
from worker.celery import celery
from worker.services import services
from worker.tasks import evaluate, gate, prepare, publish, validate

log = structlog.get_logger()

_IN_TURN = (validate.validate_next, prepare.prepare_next, gate.conclude_next, evaluate.evaluate_next)


@celery.task(name="cpu.look")
def look(_queue: str) -> None:
    """Validate files, prepare jobs and evaluate until nothing is left. The message carries none of it: rows do."""
    try:
        while any(work(services()) for work in _IN_TURN):
            pass
    except db.OUTAGE:
        log.warning("look_postponed")  # the relay rings again when the database is back


@worker_ready.connect
def _publish_bases(sender: Any, **_: object) -> None:
    """A train worker hears this signal too."""
    if any(queue.name == CPU_QUEUE for queue in sender.task_consumer.queues):
        publish.begin(services())
