"""Webhook endpoints of a project, and the log of what was sent to them."""

from collections.abc import Sequence

from sqlalchemy import Select, func, orm, select

from app import pages
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import Conflict, NotFound
from app.core.settings import WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import guard, signing
from app.webhooks.emit import EventType
from app.webhooks.schemas import EndpointCreate, EndpointUpdate

MAX_ENDPOINTS = 50  # of a project: every event is written once for each


class TooManyEndpoints(Conflict):
    code = "too_many_webhook_endpoints"


def create(session: orm.Session, caller: Caller, *, request: EndpointCreate, settings: WebhookSettings) -> WebhookEndpoint:
    """An endpoint with a secret of its own. Raises UrlRefused, TooManyEndpoints."""
    guard.parse(request.url, settings)
    if (session.scalar(select(func.count()).select_from(_visible(caller).subquery())) or 0) >= MAX_ENDPOINTS:
        raise TooManyEndpoints(f"the project has {MAX_ENDPOINTS} webhook endpoints already; delete one first")
    endpoint = WebhookEndpoint(
        id=ids.new("we_"),
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        name=request.name,
        url=request.url,
        event_types=_values(request.event_types),
        secret=signing.new_secret(),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get(session: orm.Session, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    if endpoint := session.scalar(_visible(caller).where(WebhookEndpoint.id == endpoint_id)):
        return endpoint
    raise NotFound(
        f"the webhook endpoint {endpoint_id!r} does not exist or is not yours; GET /v1/webhook_endpoints lists them",
        code="webhook_endpoint_not_found",
    )


def list_page(session: orm.Session, caller: Caller, *, after: str | None, limit: int) -> tuple[Sequence[WebhookEndpoint], bool]:
    """Newest first."""
    return pages.fetch(session, _visible(caller), WebhookEndpoint.id, after=after, limit=limit)


def update(
    session: orm.Session, caller: Caller, endpoint_id: str, *, request: EndpointUpdate, settings: WebhookSettings
) -> WebhookEndpoint:
    """Change what the request names. Messages that wait go to the new URL. Raises UrlRefused."""
    endpoint = get(session, caller, endpoint_id)
    if request.url is not None:
        guard.parse(request.url, settings)
        endpoint.url = request.url
    if request.event_types is not None:
        endpoint.event_types = _values(request.event_types)
    if request.name is not None:
        endpoint.name = request.name
    if request.is_enabled is not None:
        endpoint.is_enabled = request.is_enabled
    session.flush()
    return endpoint


def delete(session: orm.Session, caller: Caller, endpoint_id: str) -> str:
    """Forget an endpoint, its deliveries and what still waits for it."""
    endpoint = get(session, caller, endpoint_id)
    session.delete(endpoint)
    return endpoint.id


def list_deliveries(
    session: orm.Session, caller: Caller, endpoint_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[WebhookDelivery], bool]:
    """Newest first."""
    endpoint = get(session, caller, endpoint_id)
    mine = select(WebhookDelivery).where(
        WebhookDelivery.organization_id == caller.organization_id,
        WebhookDelivery.project_id == caller.project_id,
        WebhookDelivery.endpoint_id == endpoint.id,
    )
    return pages.fetch(session, mine, WebhookDelivery.id, after=after, limit=limit)


def _values(event_types: Sequence[EventType]) -> list[str]:
    """Each once, in the order given."""
    return list(dict.fromkeys(event_type.value for event_type in event_types))


def _visible(caller: Caller) -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(
        WebhookEndpoint.organization_id == caller.organization_id, WebhookEndpoint.project_id == caller.project_id
    )
