"""Deliveries: each due row is claimed for a while, sent with no transaction open, and settled. At least once, same bytes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from sqlalchemy import ColumnElement, Select, func, orm, select, true, update

from app import db
from app.core import crash, tracing
from app.core.clock import unix
from app.core.settings import WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import circuit, rotation, sending
from app.webhooks.sending import Client, Message, Outcome

log = structlog.get_logger()

# the first attempt is made at once; after the last delay there is one more, and then none
RETRY_DELAYS = (
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=24),
)
MAX_IN_FLIGHT = sending.MAX_AT_ONCE
LOOK_SECONDS = 1.0  # how often to look for new rows while slow receivers are waited for
LEASE_MARGIN = timedelta(seconds=45)
ATTEMPTS_KEPT = 10


class OnAttempt(Protocol):
    """Hears how each attempt went, and how long it took."""

    def __call__(self, *, is_delivered: bool, seconds: float) -> None: ...


def _unheard(*, is_delivered: bool, seconds: float) -> None:
    pass


@dataclass(frozen=True)
class Claim:
    """A message in our hands until its lease runs out, which no other claim of it shares. `attempts` counts those before."""

    message: Message
    organization_id: str
    endpoint_id: str
    attempts: int
    lease_expires_at: datetime
    trace: str | None


async def deliver_due(
    sessions: orm.sessionmaker[orm.Session],
    client: Client,
    settings: WebhookSettings,
    *,
    on_attempt: OnAttempt = _unheard,
    is_leaving: Callable[[], bool] = lambda: False,
) -> int:
    """Send messages until none is due, and return how many attempts that took. Once it `is_leaving`, none is claimed any more.

    No endpoint and no organization is sent more than a few at once, so one that takes long holds up nobody else. A database
    that cannot be asked for more breaks nothing off: that is raised when nothing is in flight. What is, when this is cancelled
    or crashes, is sent again when its lease runs out.
    """
    in_flight = set[asyncio.Task[None]]()
    attempts = 0
    try:
        while True:
            failure = None
            while (room := MAX_IN_FLIGHT - len(in_flight)) and not is_leaving():
                try:
                    claims = await asyncio.to_thread(_claim, sessions, settings, room=room)
                except Exception as error:
                    failure = error
                    break
                in_flight |= {asyncio.create_task(_attempt(sessions, client, settings, claim, on_attempt)) for claim in claims}
                attempts += len(claims)
                if not claims:
                    break
            if not in_flight:
                if failure:
                    raise failure
                return attempts
            _, in_flight = await asyncio.wait(in_flight, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)


def next_due_in(session: orm.Session) -> float | None:
    """Seconds until the next message is due, 0 if one is; None if none waits. Endpoints that rest are not looked at."""
    first = _waiting().lateral()
    seconds = func.extract("epoch", func.min(first.c.next_attempt_at) - func.clock_timestamp())
    found = session.scalar(select(seconds).select_from(WebhookEndpoint).join(first, true()).where(circuit.may_be_asked()))
    return None if found is None else max(0.0, float(found))


def _claim(sessions: orm.sessionmaker[orm.Session], settings: WebhookSettings, *, room: int) -> Sequence[Claim]:
    """Take up to `room` due messages, of each endpoint and organization as many as it may be sent, from before every other relay.

    In two statements: the second one sees what others took before the endpoints were locked.
    """
    with sessions.begin() as session:
        endpoint_ids = session.scalars(_ready_endpoints(room)).all()
        return _take(session, settings, endpoint_ids, room=room) if endpoint_ids else []


def _ready_endpoints(room: int) -> Select[str]:
    """Locked; those in other hands are left to them. What waits longest goes first.

    By endpoint and not by message, so that it costs the same however many messages wait for one that rests.
    """
    first = _waiting().where(_is_due()).lateral()
    return (
        select(WebhookEndpoint.id)
        .join(first, true())
        .where(circuit.may_be_asked())
        .order_by(first.c.next_attempt_at)
        .limit(room)
        .with_for_update(of=WebhookEndpoint, key_share=True, skip_locked=True)
    )


def _take(session: orm.Session, settings: WebhookSettings, endpoint_ids: Sequence[str], *, room: int) -> Sequence[Claim]:
    turn = func.row_number().over(order_by=WebhookDelivery.next_attempt_at).label("turn")
    due = _waiting(limit=circuit.MAX_PER_ENDPOINT).add_columns(turn).where(_is_due()).lateral()
    owner = WebhookEndpoint.organization_id
    rank = func.row_number().over(partition_by=owner, order_by=(due.c.turn, due.c.next_attempt_at)).label("rank")
    allowed = (
        select(due.c.id, due.c.next_attempt_at, rank, circuit.places_of_organization().label("places"))
        .select_from(WebhookEndpoint)
        .join(due, true())
        .where(WebhookEndpoint.id.in_(endpoint_ids), due.c.turn <= circuit.places())
        .subquery()
    )
    fair = select(allowed.c.id).where(allowed.c.rank <= allowed.c.places).order_by(allowed.c.rank, allowed.c.next_attempt_at)
    chosen = fair.limit(room).cte()
    lease_expires_at = func.statement_timestamp() + timedelta(seconds=settings.timeout_seconds) + LEASE_MARGIN
    taken = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == chosen.c.id, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(_is_due())  # still: a relay of the release before locks no endpoint
        .values(next_attempt_at=lease_expires_at, lease_expires_at=lease_expires_at)
        .returning(WebhookDelivery, WebhookEndpoint.url, *rotation.valid_secrets())
        .execution_options(synchronize_session=False)
    )
    return [_as_claim(row, url, *secrets) for row, url, *secrets in session.execute(taken)]


def _waiting(*, limit: int = 1) -> Select[str, datetime | None]:
    """The next messages of an endpoint that the query around names."""
    waiting = select(WebhookDelivery.id, WebhookDelivery.next_attempt_at).correlate(WebhookEndpoint)
    is_waiting = (WebhookDelivery.endpoint_id == WebhookEndpoint.id, WebhookDelivery.next_attempt_at.is_not(None))
    return waiting.where(*is_waiting).order_by(WebhookDelivery.next_attempt_at).limit(limit)


def _is_due() -> ColumnElement[bool]:
    """By the statement's time, since an index cannot answer for a clock that moves while it is read."""
    return WebhookDelivery.next_attempt_at <= func.statement_timestamp()


def _as_claim(row: WebhookDelivery, url: str, *secrets: str | None) -> Claim:
    assert row.lease_expires_at is not None
    message = Message(row.id, url, tuple(filter(None, secrets)), row.body.encode())
    return Claim(message, row.organization_id, row.endpoint_id, row.attempts, row.lease_expires_at, row.trace)


async def _attempt(
    sessions: orm.sessionmaker[orm.Session], client: Client, settings: WebhookSettings, claim: Claim, on_attempt: OnAttempt
) -> None:
    crash.point("webhook_claimed")
    about = {"delivery": claim.message.id, "endpoint": claim.endpoint_id, "org_id": claim.organization_id}
    with tracing.span("webhook", parent=claim.trace, **about, attempt=claim.attempts + 1) as span:
        outcome = await sending.send(client, settings, claim.message)
        span.set(is_delivered=not outcome.error, status=outcome.status or 0)
    crash.point("webhook_sent")
    on_attempt(is_delivered=not outcome.error, seconds=outcome.milliseconds / 1000)
    told = {"status": outcome.status, "is_delivered": not outcome.error, "milliseconds": outcome.milliseconds}
    log.info("webhook_attempted", **about, attempt=claim.attempts + 1, **told)
    try:
        await _settle_in_time(sessions, claim, outcome)
    except Exception as error:  # one that cannot be settled must not break off the others; its lease sends it again
        log.warning("webhook_unsettled", **about, error=type(error).__name__)


async def _settle_in_time(sessions: orm.sessionmaker[orm.Session], claim: Claim, outcome: Outcome) -> None:
    """Until the lease is nearly over a database that is away is waited for: what nobody wrote down is sent twice."""
    give_up_at = time.monotonic() + LEASE_MARGIN.total_seconds()
    while True:
        try:
            return await asyncio.to_thread(_settle, sessions, claim, outcome)
        except Exception as error:
            if not db.is_outage(error) or time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(LOOK_SECONDS)


def _settle(sessions: orm.sessionmaker[orm.Session], claim: Claim, outcome: Outcome) -> None:
    """Write down how the attempt went.

    A relay that was stopped for longer than its lease may come late: its failure counts only if nobody has tried since.
    """
    with sessions.begin() as session:
        endpoint = session.get(WebhookEndpoint, claim.endpoint_id, with_for_update={"key_share": True})
        row = session.get(WebhookDelivery, claim.message.id, with_for_update=True)
        if endpoint is None or row is None or row.delivered_at:
            return
        if outcome.error and row.lease_expires_at != claim.lease_expires_at:
            return
        now = session.scalars(select(func.clock_timestamp())).one()
        _record(row, outcome, now=now)
        if outcome.error:
            circuit.count_failure(session, endpoint, now=now)
        else:
            circuit.close(endpoint)


def _record(row: WebhookDelivery, outcome: Outcome, *, now: datetime) -> None:
    told = {"at": unix(now), "status": outcome.status, "error": outcome.error, "milliseconds": outcome.milliseconds}
    row.recent_attempts = [*row.recent_attempts, told][-ATTEMPTS_KEPT:]
    row.last_status, row.last_error, row.lease_expires_at = outcome.status, outcome.error, None
    is_last = row.attempts >= len(RETRY_DELAYS)
    row.next_attempt_at = None if is_last or not outcome.error else now + RETRY_DELAYS[row.attempts]
    row.delivered_at = None if outcome.error else now
    row.attempts += 1
