"""The cpu queue: whatever needs no GPU. One look does all there is to do."""

import structlog

from app import db
from worker.celery import celery
from worker.services import services
from worker.tasks import prepare, validate

log = structlog.get_logger()


@celery.task(name="cpu.look")
def look(_queue: str) -> None:
    """Validate files and prepare jobs until none is left. The message carries neither: rows do."""
    try:
        while validate.validate_next(services()) or prepare.prepare_next(services()):
            pass
    except db.OUTAGE:
        log.warning("look_postponed")  # the relay rings again when the database is back
