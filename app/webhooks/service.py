"""Webhook endpoints of a project."""

from collections.abc import Sequence

from sqlalchemy import Select, func, orm, select

from app import db, idempotency, outbox, pages
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import Conflict, NotFound
from app.core.settings import WebhookSettings
from app.models import DisabledReason, WebhookEndpoint
from app.webhooks import circuit, guard, rotation, signing
from app.webhooks.emit import EventType
from app.webhooks.schemas import EndpointCreate, EndpointUpdate, SecretRotation

MAX_ENDPOINTS = 50  # of a project: every event is written once for each


class TooManyEndpoints(Conflict):
    code = "too_many_webhook_endpoints"


def create(
    session: orm.Session, caller: Caller, *, request: EndpointCreate, settings: WebhookSettings, is_retry: bool = False
) -> WebhookEndpoint:
    """An endpoint with a secret of its own. `is_retry`: see jobs.create. Raises UrlRefused, TooManyEndpoints."""
    guard.parse(request.url, settings)
    db.take_turns(session, f"webhook endpoints of {caller.project_id}")
    if is_retry and (made := _made_just_now(session, caller, request)):
        return made
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
        wants_object=request.full_object,
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get(session: orm.Session, caller: Caller, endpoint_id: str, *, is_locked: bool = False) -> WebhookEndpoint:
    found = _visible(caller).where(WebhookEndpoint.id == endpoint_id)
    if is_locked:
        found = found.with_for_update(key_share=True).execution_options(populate_existing=True)
    if endpoint := session.scalar(found):
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
    """Change what the request names. Messages that wait go to the new URL. Raises UrlRefused.

    A new URL, and enabling, begin with a clean slate.
    """
    endpoint = get(session, caller, endpoint_id, is_locked=True)
    if request.url is not None and request.url != endpoint.url:
        guard.parse(request.url, settings)
        endpoint.url = request.url
        circuit.close(endpoint)
    if request.event_types is not None:
        endpoint.event_types = _values(request.event_types)
    if request.name is not None:
        endpoint.name = request.name
    if request.full_object is not None:
        endpoint.wants_object = request.full_object
    match request.is_enabled, endpoint.is_enabled:
        case True, False:
            circuit.enable(session, endpoint)
        case False, True:
            circuit.disable(endpoint, DisabledReason.REQUESTED)
    if session.is_modified(endpoint):
        endpoint.updated_at = func.clock_timestamp()
    session.flush()
    outbox.notify(session)
    return endpoint


def delete(session: orm.Session, caller: Caller, endpoint_id: str) -> str:
    """Forget an endpoint, its deliveries and what still waits for it. The relay removes the rows, which may be many."""
    endpoint = get(session, caller, endpoint_id, is_locked=True)
    circuit.disable(endpoint, DisabledReason.REQUESTED)
    endpoint.deleted_at = func.clock_timestamp()
    return endpoint.id


def rotate_secret(
    session: orm.Session, caller: Caller, endpoint_id: str, *, request: SecretRotation, is_retry: bool = False
) -> WebhookEndpoint:
    """Sign with a new secret, and for a day with the old one too if that is wished. `is_retry`: see jobs.create; rotated twice,
    the secret that receivers know would be gone."""
    endpoint = get(session, caller, endpoint_id, is_locked=True)
    keeps_old = request.keep_old_secret_active_for_24_hours
    if not (is_retry and keeps_old and rotation.is_just_now(session, endpoint)):
        rotation.rotate(endpoint, keeps_old=keeps_old)
    session.flush()
    return endpoint


def _made_just_now(session: orm.Session, caller: Caller, request: EndpointCreate) -> WebhookEndpoint | None:
    """The endpoint that the same request made in the last minutes."""
    made = _visible(caller).where(
        WebhookEndpoint.url == request.url,
        WebhookEndpoint.name == request.name,
        WebhookEndpoint.event_types == _values(request.event_types),
        WebhookEndpoint.wants_object == request.full_object,
        WebhookEndpoint.created_at > func.clock_timestamp() - idempotency.RETRY_WINDOW,
    )
    return session.scalar(made.order_by(WebhookEndpoint.id.desc()).limit(1))


def _values(event_types: Sequence[EventType]) -> list[str]:
    """Each once, in the order given."""
    return list(dict.fromkeys(event_type.value for event_type in event_types))


def _visible(caller: Caller) -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(
        WebhookEndpoint.organization_id == caller.organization_id,
        WebhookEndpoint.project_id == caller.project_id,
        WebhookEndpoint.deleted_at.is_(None),
    )
