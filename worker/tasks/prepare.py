"""Tokenise a job's files for its base, size the run, and queue it."""

import structlog

from app.core import spec
from app.core.catalog import Base
from app.core.errors import Unavailable
from app.core.render import Renderer
from app.jobs import service as jobs
from app.jobs.service import Datasets, ToPrepare
from worker.model import base as bases
from worker.services import Services
from worker.training.tokenise import TokenisedSet

log = structlog.get_logger()


class Unusable(Exception):
    """Nothing in the file can be trained on with this base and these settings."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def prepare_next(to: Services) -> bool:
    """Prepare one job; False when none waits."""
    with to.sessions.begin() as session:
        job = jobs.claim_to_prepare(session)
    if job is None:
        return False
    base = to.catalog[job.base]
    try:
        training, datasets = _tokenised(to, job, base)
    except Unusable as error:
        with to.sessions.begin() as session:
            jobs.reject(session, job.id, code="invalid_file", message=str(error), param=error.param)
        return True
    except Unavailable:
        log.warning("preparation_postponed", job_id=job.id)
        with to.sessions.begin() as session:
            jobs.postpone(session, job.id)
        return False
    resolved = spec.resolve(job.requested, base, seed=job.seed, examples=training.examples)
    plan = jobs.plan_of(base, resolved, training.summary())
    with to.sessions.begin() as session:
        jobs.finish_preparing(session, job.id, resolved=resolved, plan=plan, datasets=datasets)
    log.info("job_prepared", job_id=job.id, examples=training.examples, tokens=training.tokens)
    return True


def _tokenised(to: Services, job: ToPrepare, base: Base) -> tuple[TokenisedSet, Datasets]:
    renderer = Renderer.open(bases.card(base, to.settings.cache_dir))
    longest = spec.max_seq_length(job.requested, base)
    training = _read(to, job.training_key, renderer, longest, "training_file")
    validation = _read(to, job.validation_key, renderer, longest, "validation_file") if job.validation_key else None
    return training, Datasets(
        training=_store(to, job.organization_id, training),
        validation=_store(to, job.organization_id, validation) if validation else None,
    )
