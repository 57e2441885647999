from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app import pages
from app.deps import Caller, IsRetry, Session, Settings
from app.idempotency import IdempotentRoute
from app.webhooks import delivery_log
from app.webhooks import service as webhooks
from app.webhooks.emit import EventType
from app.webhooks.samples import Sampler
from app.webhooks.schemas import (
    DeliveryDetail,
    DeliveryOut,
    DeliveryStatus,
    EndpointCreate,
    EndpointDeleted,
    EndpointOut,
    EndpointUpdate,
    EndpointWithSecret,
    EventTypeList,
    RangeReplay,
    RangeReplayed,
    SampleRequest,
    SampleResult,
    SecretRotation,
)

router = APIRouter(prefix="/v1", tags=["Webhooks"], route_class=IdempotentRoute)


def get_sampler(request: Request) -> Sampler:
    sampler: Sampler = request.app.state.sampler
    return sampler


Samples = Annotated[Sampler, Depends(get_sampler)]


@router.post("/webhook_endpoints")
def create_webhook_endpoint(
    body: EndpointCreate, session: Session, caller: Caller, settings: Settings, is_retry: IsRetry
) -> EndpointWithSecret:
    """Be told of events at a URL. The answer carries the signing secret, which is shown this once."""
    made = webhooks.create(session, caller, request=body, settings=settings.webhooks, is_retry=is_retry)
    return EndpointWithSecret.of(made)


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


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
def rotate_webhook_secret(
    endpoint_id: str, body: SecretRotation, session: Session, caller: Caller, is_retry: IsRetry
) -> EndpointWithSecret:
    """Sign with a new secret, which is shown this once; for 24 hours with the old one too if you say so."""
    return EndpointWithSecret.of(webhooks.rotate_secret(session, caller, endpoint_id, request=body, is_retry=is_retry))


@router.post("/webhook_endpoints/{endpoint_id}/test")
async def test_webhook_endpoint(endpoint_id: str, body: SampleRequest, caller: Caller, sampler: Samples) -> SampleResult:
    """Send a sample event now, once, and tell how it went. Nothing is queued, and a disabled endpoint is tried too."""
    outcome = await sampler.send(caller, endpoint_id, body.event_type)
    return SampleResult.of(endpoint_id, body.event_type, outcome)


@router.get("/webhook_endpoints/{endpoint_id}/deliveries")
def list_webhook_deliveries(
    endpoint_id: str,
    session: Session,
    caller: Caller,
    status: DeliveryStatus | None = None,
    event_type: EventType | None = None,
    after: str | None = None,
    limit: pages.Limit = 20,
) -> pages.Page[DeliveryOut]:
    """What was sent to an endpoint in the last 30 days and how that went, newest first."""
    found = delivery_log.list_page(session, caller, endpoint_id, status=status, event_type=event_type, after=after, limit=limit)
    return pages.page(found, DeliveryOut.of)


@router.get("/webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}")
def get_webhook_delivery(endpoint_id: str, delivery_id: str, session: Session, caller: Caller) -> DeliveryDetail:
    """One delivery, with what is sent and its last attempts."""
    return DeliveryDetail.of(delivery_log.get(session, caller, endpoint_id, delivery_id))


@router.post("/webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}/replay")
def replay_webhook_delivery(endpoint_id: str, delivery_id: str, session: Session, caller: Caller) -> DeliveryOut:
    """Send a message again, delivered or not: the same id and bytes, on a fresh schedule."""
    return DeliveryOut.of(delivery_log.replay(session, caller, endpoint_id, delivery_id))


@router.post("/webhook_endpoints/{endpoint_id}/replay")
def replay_webhook_deliveries(endpoint_id: str, body: RangeReplay, session: Session, caller: Caller) -> RangeReplayed:
    """Send the messages of a time again, at most 10,000 at once, and tell how many."""
    return RangeReplayed(replayed=delivery_log.replay_range(session, caller, endpoint_id, request=body))


@router.get("/webhook_event_types")
def list_webhook_event_types() -> EventTypeList:
    """Everything an endpoint can be told of."""
    return EventTypeList()
