"""How things stand in the database, for the operator: what waits, for how long, and who is there to do it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, orm, select
from sqlalchemy.dialects.postgresql import insert

from app import processes
from app.evaluations import leases as evaluations
from app.files import service as files
from app.inference import engines
from app.jobs import gates, preparing, turns
from app.models import (
    Engine,
    Evaluation,
    File,
    Job,
    JobState,
    OutboxMessage,
    Process,
    Snapshot,
    WebhookDelivery,
    WebhookEndpoint,
)
from app.webhooks import circuit

LATEST = "latest"
NOW = func.statement_timestamp()  # an index cannot answer for a clock that moves while it is read


@dataclass(frozen=True)
class Waiting:
    """How many wait that may be taken now, and how long the oldest of them has been able to; 0 when none does."""

    count: int = 0
    oldest_seconds: float = 0.0


@dataclass(frozen=True)
class Webhooks:
    """`waiting` deliveries are those that will be tried, `due` the ones that may be just now: endpoints that fail rest meanwhile.
    Of `exhausted` ones the last try has failed."""

    waiting: int
    due: Waiting
    exhausted: int
    disabled_endpoints: int


@dataclass(frozen=True)
class Standing:
    """`attempts` are those of all jobs there are, since the first. `leases_expired` are still to be reaped."""

    jobs: Mapping[str, int]
    attempts: int
    leases_expired: int
    queues: Mapping[str, Waiting]
    outbox: Waiting
    webhooks: Webhooks
    engines: Sequence[Engine]
    processes: Sequence[Process]


def read(session: orm.Session, *, engine_timeout_seconds: float) -> Standing:
    """All of it, as the system role sees it."""
    totals = select(Job.state, func.count(), func.sum(Job.attempt)).group_by(Job.state)
    counted = session.execute(totals).all()
    expired = select(func.count()).where(Job.state == JobState.RUNNING, Job.lease_expires_at < NOW)
    return Standing(
        jobs=dict.fromkeys(map(str, JobState), 0) | {state: count for state, count, _ in counted},
        attempts=sum(attempts for _, _, attempts in counted),
        leases_expired=session.scalars(expired).one(),
        queues=_queues(session),
        outbox=_waiting(session, OutboxMessage.not_before, OutboxMessage.not_before <= NOW),
        webhooks=_webhooks(session),
        engines=engines.list_live(session, timeout_seconds=engine_timeout_seconds),
        processes=processes.list_live(session),
    )


def as_data(found: Standing) -> dict[str, Any]:
    """As JSON has it."""
    counted = {name: getattr(found, name) for name in ("jobs", "attempts", "leases_expired")}
    queues = {name: asdict(waiting) for name, waiting in found.queues.items()}
    processes = [_row(process, "id", "kind", "queues", "heartbeat_at", "broker_at") for process in found.processes]
    of_engine = ("id", "base", "quantization", "running", "waiting", "adapters", "heartbeat_at")
    engines = [_row(engine, *of_engine) for engine in found.engines]
    relayed = {"outbox": asdict(found.outbox), "webhooks": asdict(found.webhooks)}
    return {**counted, "queues": queues, **relayed, "processes": processes, "engines": engines}


def keep(session: orm.Session, found: Standing) -> None:
    """For the operator's page: the API sees one organization at a time."""
    values = {"told": as_data(found), "taken_at": func.clock_timestamp()}
    session.execute(insert(Snapshot).values(id=LATEST, **values).on_conflict_do_update(index_elements=[Snapshot.id], set_=values))


def kept(session: orm.Session) -> tuple[Snapshot, float] | None:
    """And how many seconds old it is. None until a relay has looked for the first time."""
    age_seconds = func.extract("epoch", func.clock_timestamp() - Snapshot.taken_at)
    row = session.execute(select(Snapshot, age_seconds).where(Snapshot.id == LATEST)).one_or_none()
    return (row[0], float(row[1])) if row else None


def _row(row: Process | Engine, *names: str) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in names}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _queues(session: orm.Session) -> dict[str, Waiting]:
    """Of each queue that holds anything claimable, and of the cpu's in any case: it is everybody's."""
    let_go_at = func.greatest(Evaluation.not_before, Evaluation.lease_expires_at)
    evaluated_at = select(func.max(Evaluation.finished_at)).where(Evaluation.job_id == Job.id).scalar_subquery()
    of_cpu = (
        _waiting(session, File.not_before, files.claimable(NOW)),
        _waiting(session, Job.not_before, preparing.claimable(NOW)),
        _waiting(session, let_go_at, evaluations.claimable(NOW)),
        _waiting(session, evaluated_at, gates.decidable()),
    )
    cpu = Waiting(sum(each.count for each in of_cpu), max(each.oldest_seconds for each in of_cpu))
    since = func.greatest(Job.queued_at, Job.not_before)
    queues = select(Job.queue, func.count(), _seconds_since(since)).where(turns.claimable(NOW)).group_by(Job.queue)
    return {files.CPU_QUEUE: cpu} | {queue: Waiting(count, float(seconds)) for queue, count, seconds in session.execute(queues)}


def _webhooks(session: orm.Session) -> Webhooks:
    wanted = WebhookDelivery.endpoint_id == WebhookEndpoint.id, WebhookDelivery.next_attempt_at.is_not(None)
    given_up = WebhookDelivery.next_attempt_at.is_(None), WebhookDelivery.delivered_at.is_(None)
    since = func.greatest(WebhookDelivery.next_attempt_at, WebhookEndpoint.not_before)
    disabled = (~WebhookEndpoint.is_enabled, WebhookEndpoint.deleted_at.is_(None))
    return Webhooks(
        waiting=session.scalars(select(func.count()).where(*wanted, WebhookEndpoint.is_enabled)).one(),
        due=_waiting(session, since, *wanted, WebhookDelivery.next_attempt_at <= NOW, circuit.may_be_asked()),
        exhausted=session.scalars(select(func.count()).select_from(WebhookDelivery).where(*given_up)).one(),
        disabled_endpoints=session.scalars(select(func.count()).where(*disabled)).one(),
    )


def _waiting(session: orm.Session, since: Any, *conditions: ColumnElement[bool]) -> Waiting:
    """Rows that may be taken now, and could from the instant in this column on."""
    count, seconds = session.execute(select(func.count(), _seconds_since(since)).where(*conditions)).one()
    return Waiting(count, float(seconds or 0))


def _seconds_since(instant: Any) -> ColumnElement[Any]:
    return func.extract("epoch", NOW - func.min(instant))
