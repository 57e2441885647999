"""What a job's owner is told, in order and without a gap."""

from typing import Any, Literal

from sqlalchemy import orm

from app.core import events as engine_events
from app.core import ids
from app.models import Job, JobEvent

Level = Literal["info", "warn", "error"]


def append(
    session: orm.Session,
    job: Job,
    message: str,
    *,
    level: Level = "info",
    type: Literal["message", "metrics"] = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """Add an event to a job whose row this transaction has locked: the count on the row gives the sequence."""
    job.event_count += 1
    session.add(
        JobEvent(
            id=ids.new("ftevent-"),
            organization_id=job.organization_id,
            project_id=job.project_id,
            job_id=job.id,
            sequence=job.event_count,
            level=level,
            type=type,
            message=message,
            data=data,
        )
    )


def record(session: orm.Session, job: Job, event: engine_events.Event) -> None:
    """Tell the owner what the engine said, where it concerns them."""
    match event:
        case engine_events.Started(resumed_from=0):
            append(session, job, f"Training started: {event.total_steps} steps")
        case engine_events.Started():
            append(session, job, f"Training resumed at step {event.resumed_from} of {event.total_steps}")
        case engine_events.Stepped():
            message = f"Step {event.step}/{event.total_steps}: training loss={event.train_loss:.4f}"
            append(session, job, message, type="metrics", data=_metrics(event))
        case engine_events.Evaluated():
            message = f"Step {event.step}: validation loss={event.valid_loss:.4f}"
            append(session, job, message, type="metrics", data=_metrics(event))
        case engine_events.Examined():
            _record_examined(session, job, event)
        case engine_events.Noted():
            append(session, job, event.message, level=event.level)


def _metrics(event: engine_events.Stepped | engine_events.Evaluated) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude={"kind", "rewards"}) | event.rewards


def _record_examined(session: orm.Session, job: Job, event: engine_events.Examined) -> None:
    """What the run has come to stays with the job, and its owner is told the worst of it first."""
    held_out = event.held_out
    job.held_out = held_out.model_dump(mode="json") if held_out else None
    job.examined = event.model_dump(mode="json", exclude={"kind", "held_out", "table"})
    if held_out:
        is_better = held_out.adapter.loss < held_out.base.loss
        message = (
            f"{held_out.examples} held-out rows, base against adapter: "
            f"loss {held_out.base.loss:.4f} → {held_out.adapter.loss:.4f}, "
            f"token accuracy {held_out.base.mean_token_accuracy:.1%} → {held_out.adapter.mean_token_accuracy:.1%}"
        )
        append(session, job, message, level="info" if is_better else "warn", data={"held_out": job.held_out})
    else:
        message = "No rows were held out, so nothing says whether the adapter is better than the base: send a validation_file"
        append(session, job, f"{message} or training.validation_split")
    if event.suspicious_count:
        message = f"{event.suspicious_count} rows look as if they were not meant so: see examined.suspicious of the job"
        append(session, job, message, level="warn")
