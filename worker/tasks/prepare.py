"""Tokenise a job's files for its base, size the run, and queue it."""

from datetime import timedelta
from functools import partial

import structlog

from app.core import crash, spec, tracing
from app.core.errors import BadRequest, Unavailable
from app.jobs import admission, preparing
from app.jobs.admission import Data
from app.jobs.preparing import ToPrepare
from worker import datasets, patience
from worker.datasets import Damaged, Unusable
from worker.hold import held
from worker.model.source import BaseRefused
from worker.services import Services
from worker.tasks.publish import publish

log = structlog.get_logger()


def prepare_next(to: Services) -> bool:
    """Prepare one job; False when none waits."""
    with to.sessions.begin() as session:
        job = preparing.claim(session, lease_seconds=to.settings.leases.lease_seconds)
    if job is None:
        return False
    with to.in_hand.holding(lambda session: preparing.postpone(session, job.id, by=timedelta())):
        return _attempt(to, job)


def _attempt(to: Services, job: ToPrepare) -> bool:
    try:
        with (
            tracing.span("prepare", parent=job.trace, job_id=job.id, base=job.base),
            held(to, partial(preparing.hold, job_id=job.id)),
        ):
            _prepare(to, job)
    except Unusable as error:
        message, param = str(error), error.param
        patience.say(
            to.sessions, lambda session: preparing.reject(session, job.id, code="invalid_file", message=message, param=param)
        )
    except BadRequest as error:
        refused = {"code": error.code or "invalid_value", "message": str(error), "param": error.param or "model"}
        patience.say(to.sessions, lambda session: preparing.reject(session, job.id, **refused))
    except Unavailable:
        log.warning("preparation_postponed", job_id=job.id)
        patience.say(to.sessions, lambda session: preparing.postpone(session, job.id))
        return False
    except Exception as error:  # a base that cannot be had, a full disk: another try may do, but not for ever
        log.exception("preparation_failed", job_id=job.id)
        reason = str(error) if isinstance(error, BaseRefused | Damaged) else type(error).__name__
        leases = to.settings.leases
        patience.say(to.sessions, lambda session: preparing.failed(session, job.id, reason=reason, settings=leases))
    return True


def _prepare(to: Services, job: ToPrepare) -> None:
    base = to.catalog[job.base]
    written_card = publish(to, base)
    made = datasets.make(to, job, card=written_card, max_seq_length=spec.max_seq_length(job.requested, base))
    known = Data.of(made.report)
    settings = to.settings
    admitted = admission.admit(
        base, job.requested, known, seed=job.seed, among=settings.training.tiers, gpu=settings.gpu, catalog=to.catalog
    )
    crash.point("dataset_stored")
    patience.say(
        to.sessions,
        lambda session: preparing.finish(
            session, job.id, admitted=admitted, datasets=made.datasets, report=made.report, reused=made.reused
        ),
    )
    crash.point("job_prepared")
    log.info("job_prepared", job_id=job.id, queue=admitted.queue, examples=known.examples, reused=made.reused)
