from fastapi import APIRouter

from app import pages
from app.deps import Caller, Session, Settings
from app.webhooks import service as webhooks
from app.webhooks.schemas import (
    DeliveryOut,
    EndpointCreate,
    EndpointDeleted,
    EndpointOut,
    EndpointUpdate,
    EndpointWithSecret,
    EventTypeList,
)

router = APIRouter(prefix="/v1", tags=["Webhooks"])


@router.post("/webhook_endpoints")
def create_webhook_endpoint(body: EndpointCreate, session: Session, caller: Caller, settings: Settings) -> EndpointWithSecret:
    """Be told of events at a URL. The answer carries the signing secret, which is shown this once."""
    return EndpointWithSecret.of(webhooks.create(session, caller, request=body, settings=settings.webhooks))


@router.get("/webhook_endpoints")
def list_webhook_endpoints(
    session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[EndpointOut]:
    """Your webhook endpoints, newest first."""
    return pages.page(webhooks.list_page(session, caller, after=after, limit=limit), EndpointOut.of)


@router.get("/webhook_endpoints/{endpoint_id}")
def get_webhook_endpoint(endpoint_id: str, session: Session, caller: Caller) -> EndpointOut:
    """One webhook endpoint."""
    return EndpointOut.of(webhooks.get(session, caller, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}")
def update_webhook_endpoint(
    endpoint_id: str, body: EndpointUpdate, session: Session, caller: Caller, settings: Settings
) -> EndpointOut:
    """Change a webhook endpoint. What the body does not name stays."""
    return EndpointOut.of(webhooks.update(session, caller, endpoint_id, request=body, settings=settings.webhooks))


@router.delete("/webhook_endpoints/{endpoint_id}")
def delete_webhook_endpoint(endpoint_id: str, session: Session, caller: Caller) -> EndpointDeleted:
    """Delete a webhook endpoint, and with it the messages that still wait for it."""
    return EndpointDeleted(id=webhooks.delete(session, caller, endpoint_id))


@router.get("/webhook_endpoints/{endpoint_id}/deliveries")
def list_webhook_deliveries(
    endpoint_id: str, session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[DeliveryOut]:
    """What was sent to an endpoint and how that went, newest first."""
    return pages.page(webhooks.list_deliveries(session, caller, endpoint_id, after=after, limit=limit), DeliveryOut.of)


@router.get("/webhook_event_types")
def list_webhook_event_types() -> EventTypeList:
    """Everything an endpoint can be told of."""
    return EventTypeList()
