"""The circuit of an endpoint: while it fails it is asked by one message at a time, ever more seldom, and after days no more.

All of it is in the endpoint's row, since relays are several. Messages that are held back keep their attempts.
"""

from datetime import datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, ScalarSelect, and_, case, func, or_, orm, select, update

from app.models import DisabledReason, WebhookDelivery, WebhookEndpoint
from app.webhooks import emit

log = structlog.get_logger()

MAX_PER_ENDPOINT = 4
MAX_PER_ORGANIZATION = 32  # however many endpoints it has: a quarter of what a relay has in flight
OPENS_AFTER = 5  # failures in a row
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=10), timedelta(minutes=10)
DISABLED_AFTER = timedelta(days=5)


def may_be_asked() -> ColumnElement[bool]:
    """Whether the endpoint is to be sent anything just now."""
    is_due = or_(WebhookEndpoint.not_before.is_(None), WebhookEndpoint.not_before <= func.statement_timestamp())
    return and_(WebhookEndpoint.is_enabled, is_due, places() > 0, places_of_organization() > 0)


def places() -> ColumnElement[int]:
    """How many more messages may be in flight to the endpoint, from all relays together."""
    in_flight = _in_flight(WebhookDelivery.endpoint_id == WebhookEndpoint.id)
    return case((WebhookEndpoint.failures_in_a_row > 0, 1), else_=MAX_PER_ENDPOINT) - in_flight


def places_of_organization() -> ColumnElement[int]:
    """How many more to all endpoints of its organization. Relays that claim in the same moment may take some too many."""
    return MAX_PER_ORGANIZATION - _in_flight(WebhookDelivery.organization_id == WebhookEndpoint.organization_id)


def _in_flight(whose: ColumnElement[bool]) -> ScalarSelect[int]:
    is_leased = WebhookDelivery.lease_expires_at > func.statement_timestamp()
    counted = select(func.count()).select_from(WebhookDelivery).where(whose, is_leased)
    return counted.correlate(WebhookEndpoint).scalar_subquery()


def close(endpoint: WebhookEndpoint) -> None:
    """Nothing is held against the endpoint any more."""
    endpoint.failing_since, endpoint.failures_in_a_row, endpoint.not_before = None, 0, None


def count_failure(session: orm.Session, endpoint: WebhookEndpoint, *, now: datetime) -> None:
    """Hold an attempt that failed against its locked endpoint, and disable one that has failed for days."""
    endpoint.failures_in_a_row += 1
    endpoint.failing_since = endpoint.failing_since or now
    if endpoint.failures_in_a_row >= OPENS_AFTER:
        endpoint.not_before = now + pause_after(endpoint.failures_in_a_row)
    if endpoint.is_enabled and now - endpoint.failing_since >= DISABLED_AFTER:
        _give_up(session, endpoint)


def pause_after(failures_in_a_row: int) -> timedelta:
    doublings = min(failures_in_a_row - OPENS_AFTER, 10)  # more would be the longest pause anyway, and overflow some day
    return min(FIRST_PAUSE * (1 << doublings), LONGEST_PAUSE)


def enable(session: orm.Session, endpoint: WebhookEndpoint) -> None:
    if endpoint.disabled_reason == DisabledReason.FAILING:
        _exhaust(session, endpoint)  # once more: an event may have been written while it was given up
    endpoint.is_enabled, endpoint.disabled_at, endpoint.disabled_reason = True, None, None
    close(endpoint)


def disable(endpoint: WebhookEndpoint, reason: DisabledReason) -> None:
    endpoint.is_enabled, endpoint.disabled_at, endpoint.disabled_reason = False, func.clock_timestamp(), reason


def _give_up(session: orm.Session, endpoint: WebhookEndpoint) -> None:
    disable(endpoint, DisabledReason.FAILING)
    _exhaust(session, endpoint)
    emit.emit(
        session,
        organization_id=endpoint.organization_id,
        project_id=endpoint.project_id,
        type=emit.EventType.ENDPOINT_DISABLED,
        data_id=endpoint.id,
    )
    log.warning("webhook_endpoint_disabled", endpoint=endpoint.id, org_id=endpoint.organization_id)


def _exhaust(session: orm.Session, endpoint: WebhookEndpoint) -> None:
    """Of what waits, so that enabling the endpoint days later floods nobody: its owner says what to replay."""
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.next_attempt_at.is_not(None))
        .values(next_attempt_at=None)
    )
