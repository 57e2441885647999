"""The log of what was sent to an endpoint, and sending it again."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Select, and_, delete, func, or_, orm, select, update

from app import outbox, pages
from app.accounts.caller import Caller
from app.core.errors import BadRequest, Conflict, NotFound
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import service as endpoints
from app.webhooks.emit import EventType
from app.webhooks.schemas import DeliveryStatus, RangeReplay

KEPT = timedelta(days=30)
MAX_REPLAYED = 10_000
MAX_REMOVED = 1000  # at once, so that the transaction stays short

_IS_OF = {
    DeliveryStatus.DELIVERED: WebhookDelivery.delivered_at.is_not(None),
    DeliveryStatus.WAITING: WebhookDelivery.next_attempt_at.is_not(None),
    DeliveryStatus.EXHAUSTED: and_(WebhookDelivery.delivered_at.is_(None), WebhookDelivery.next_attempt_at.is_(None)),
}


class EndpointDisabled(Conflict):
    code = "webhook_endpoint_disabled"


class DeliveryInFlight(Conflict):
    code = "webhook_delivery_in_flight"


class TooManyToReplay(BadRequest):
    code, param = "too_many_webhook_deliveries", "since"


def list_page(
    session: orm.Session,
    caller: Caller,
    endpoint_id: str,
    *,
    status: DeliveryStatus | None,
    event_type: EventType | None,
    after: str | None,
    limit: int,
) -> tuple[Sequence[WebhookDelivery], bool]:
    """Newest first."""
    mine = _of(endpoints.get(session, caller, endpoint_id))
    if status is not None:
        mine = mine.where(_IS_OF[status])
    if event_type is not None:
        mine = mine.where(WebhookDelivery.event_type == event_type)
    mine = mine.options(orm.defer(WebhookDelivery.body, raiseload=True))  # may hold whole jobs, and is shown of one alone
    return pages.fetch(session, mine, WebhookDelivery.id, after=after, limit=limit)


def get(session: orm.Session, caller: Caller, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    return _get(session, endpoints.get(session, caller, endpoint_id), delivery_id)


def replay(session: orm.Session, caller: Caller, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Send a message again, whatever became of it: the same id and bytes, on a fresh schedule.

    Raises EndpointDisabled, DeliveryInFlight.
    """
    endpoint = _wake(session, caller, endpoint_id)
    row = _get(session, endpoint, delivery_id)
    if not _begin_again(session, [row.id]):
        raise DeliveryInFlight(f"the delivery {delivery_id!r} is being sent just now; look at it again in a minute")
    session.refresh(row)
    return row


def replay_range(session: orm.Session, caller: Caller, endpoint_id: str, *, request: RangeReplay) -> int:
    """Send again what is of that time, but for what is being sent just now. Returns how many.

    Raises EndpointDisabled, TooManyToReplay.
    """
    endpoint = _wake(session, caller, endpoint_id)
    wanted = _of(endpoint).where(WebhookDelivery.created_at >= _instant(request.since))
    if request.until is not None:
        wanted = wanted.where(WebhookDelivery.created_at < _instant(request.until))
    if request.only_failed:
        wanted = wanted.where(WebhookDelivery.delivered_at.is_(None))
    ids = session.scalars(wanted.with_only_columns(WebhookDelivery.id).limit(MAX_REPLAYED + 1)).all()
    if len(ids) > MAX_REPLAYED:
        raise TooManyToReplay(f"more than {MAX_REPLAYED:,} deliveries are of that time; narrow it with `since` and `until`")
    return len(_begin_again(session, ids))


def remove_old(session: orm.Session) -> int:
    """Forget some of what is a month old and waits no more. Returns how many."""
    is_over = (WebhookDelivery.created_at < func.clock_timestamp() - KEPT, WebhookDelivery.next_attempt_at.is_(None))
    return _remove(session, select(WebhookDelivery.id).where(*is_over).order_by(WebhookDelivery.created_at))


def remove_deleted(session: orm.Session) -> int:
    """Forget some of what was for endpoints that are deleted, and those of which nothing is left. Returns how many rows."""
    is_deleted = WebhookEndpoint.deleted_at.is_not(None)
    theirs = WebhookDelivery.endpoint_id.in_(select(WebhookEndpoint.id).where(is_deleted))
    if removed := _remove(session, select(WebhookDelivery.id).where(theirs)):
        return removed
    is_empty = ~select(WebhookDelivery.id).where(WebhookDelivery.endpoint_id == WebhookEndpoint.id).exists()
    return len(session.scalars(delete(WebhookEndpoint).where(is_deleted, is_empty).returning(WebhookEndpoint.id)).all())


def _remove(session: orm.Session, ids: Select[str]) -> int:
    first = ids.limit(MAX_REMOVED).with_for_update(skip_locked=True)
    gone = delete(WebhookDelivery).where(WebhookDelivery.id.in_(first)).returning(WebhookDelivery.id)
    return len(session.scalars(gone).all())


def _wake(session: orm.Session, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    """The endpoint, locked, and asked at once though it rests: so its owner wishes."""
    endpoint = endpoints.get(session, caller, endpoint_id, is_locked=True)
    if not endpoint.is_enabled:
        raise EndpointDisabled("the endpoint is disabled; enable it first, then replay")
    endpoint.not_before = None
    outbox.notify(session)
    return endpoint


def _begin_again(session: orm.Session, ids: Sequence[str]) -> Sequence[str]:
    """Those of the deliveries that nobody holds, due now as if they were new. Whoever held one too long speaks for it no more."""
    is_free = or_(WebhookDelivery.lease_expires_at.is_(None), WebhookDelivery.lease_expires_at <= func.clock_timestamp())
    return session.scalars(
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(ids), is_free)
        .values(attempts=0, next_attempt_at=func.clock_timestamp(), delivered_at=None, lease_expires_at=None)
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    ).all()


def _get(session: orm.Session, endpoint: WebhookEndpoint, delivery_id: str) -> WebhookDelivery:
    if row := session.scalar(_of(endpoint).where(WebhookDelivery.id == delivery_id)):
        return row
    raise NotFound(
        f"the webhook delivery {delivery_id!r} does not exist, or is another endpoint's, or older than {KEPT.days} days; "
        f"GET /v1/webhook_endpoints/{endpoint.id}/deliveries lists them",
        code="webhook_delivery_not_found",
    )


def _of(endpoint: WebhookEndpoint) -> Select[WebhookDelivery]:
    return select(WebhookDelivery).where(
        WebhookDelivery.organization_id == endpoint.organization_id,
        WebhookDelivery.project_id == endpoint.project_id,
        WebhookDelivery.endpoint_id == endpoint.id,
    )


def _instant(unix_seconds: int) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)
