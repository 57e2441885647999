"""The cpu queue: whatever needs no GPU. One look does all there is to do."""

from worker.celery import celery
from worker.services import services
from worker.tasks import prepare, validate


@celery.task(name="cpu.look")
def look(_queue: str) -> None:
    """Validate files and prepare jobs until none is left. The message carries neither: rows do."""
    while validate.validate_next(services()) or prepare.prepare_next(services()):
        pass
