"""Tokenise a job's files for its base, size the run, and queue it."""

from functools import cache

import structlog

from app.core import memory, spec, tiers
from app.core.catalog import Base
from app.core.errors import Unavailable
from app.core.settings import Settings
from app.core.spec import TrainSpec
from app.jobs import preparing
from app.jobs.preparing import ToPrepare
from worker import datasets, patience
from worker.datasets import Damaged, Unusable
from worker.model import card
from worker.model.source import BaseRefused
from worker.services import Services

log = structlog.get_logger()
_publish = cache(card.publish)  # once for a worker


def prepare_next(to: Services) -> bool:
    """Prepare one job; False when none waits."""
    with to.sessions.begin() as session:
        job = preparing.claim(session)
    if job is None:
        return False
    try:
        _prepare(to, job)
    except Unusable as error:
        message, param = str(error), error.param
        patience.say(
            to.sessions, lambda session: preparing.reject(session, job.id, code="invalid_file", message=message, param=param)
        )
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
    written_card = card.prepared(base, to.settings.cache_dir)
    _publish(to.storage, base.id, written_card)
    made = datasets.make(to, job, card=written_card, max_seq_length=spec.max_seq_length(job.requested, base))
    training, validation = made.report.trained_on, made.report.validated_on
    longest = max(training.longest, validation.longest if validation else 0)
    resolved = spec.resolve(job.requested, base, seed=job.seed, examples=training.examples, longest=longest)
    plan = preparing.plan_of(
        base,
        resolved,
        examples=training.examples,
        dropped=made.report.training.left_out_count,
        truncated=made.report.training.rows_cut,
        validation=validation.examples if validation else 0,
        tokens=training.tokens,
        trained_tokens=training.trained_tokens,
    )
    queue = _queue_with_room(base, resolved, to.settings, predicted_bytes=plan["predicted_peak_bytes"], longest=longest)
    patience.say(
        to.sessions,
        lambda session: preparing.finish(
            session,
            job.id,
            resolved=resolved,
            plan=plan,
            datasets=made.datasets,
            report=made.report,
            reused=made.reused,
            queue=queue,
        ),
    )
    log.info("job_prepared", job_id=job.id, queue=queue, examples=training.examples, reused=made.reused)


def _queue_with_room(base: Base, resolved: TrainSpec, settings: Settings, *, predicted_bytes: int, longest: int) -> str:
    """That of the smallest tier with room. Refuses here what a GPU would refuse after an hour in its queue. Raises Unusable."""
    among = settings.training.tiers
    if tier := tiers.smallest_with_room(base, among, settings.gpu, predicted_bytes=predicted_bytes):
        return f"train.{tier}"
    held = tiers.holding(base, among)
    if not held:  # the operator has taken it away since the job was created
        raise Unusable("model", f"{base.id} needs a GPU worker of {base.tier} GB, which this installation no longer has")
    usable = (tiers.usable_bytes(held[-1], settings.gpu) or 0) / memory.GIB
    param, advice = _what_to_lower(resolved, longest)
    message = (
        f"this run needs about {predicted_bytes / memory.GIB:.1f} GiB and the largest worker, of {held[-1]} GB, "
        f"has {usable:.1f} GiB for it; {advice}"
    )
    raise Unusable(param, message)


def _what_to_lower(resolved: TrainSpec, longest: int) -> tuple[str, str]:
    """A parameter and what to do about it, the most effective first."""
    if resolved.micro_batch_tokens == longest:  # shorter rows share a micro-batch, whose size they do not decide
        return "training.max_seq_length", "lower training.max_seq_length, beyond which rows are left out or cut"
    if resolved.lora.dropout:
        return "adapter.dropout", "set adapter.dropout to 0"
    return "model", "choose a smaller base model"
