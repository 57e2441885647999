from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from app.core.clock import unix
from app.models import WebhookDelivery, WebhookEndpoint
from app.schemas import Request
from app.webhooks import signing
from app.webhooks.emit import EventType
from app.webhooks.sending import Outcome

Name = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
EventTypes = Annotated[list[EventType], Field(min_length=1)]
UnixSeconds = Annotated[int, Field(ge=0, le=253_402_300_799)]  # Python's dates end with the year 9999


class DeliveryStatus(StrEnum):
    """Of a delivery whose attempts are exhausted nothing more is tried, unless it is replayed."""

    DELIVERED = "delivered"
    WAITING = "waiting"
    EXHAUSTED = "exhausted"


class EndpointCreate(Request):
    """Without `event_types`, the endpoint is told of everything. With `full_object`, `data` is the whole job or checkpoint."""

    url: str
    event_types: EventTypes = Field(default=list(EventType))
    name: Name = ""
    full_object: bool = False


class EndpointUpdate(Request):
    """What is absent stays as it is."""

    url: str | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    full_object: bool | None = None
    is_enabled: bool | None = None


class SecretRotation(Request):
    """The SDK's words."""

    keep_old_secret_active_for_24_hours: bool = False


class SampleRequest(Request):
    """Which kind of event to send as a sample."""

    event_type: EventType


class RangeReplay(Request):
    """Deliveries made from `since` until before `until`, or until now; with `only_failed`, those that were never taken."""

    since: UnixSeconds
    until: UnixSeconds | None = None
    only_failed: bool = False


class EndpointOut(BaseModel):
    """The SDK's WebhookEndpoint; all from `full_object` on is ours.

    An endpoint that has failed several times in a row is asked next at `asked_again_at`.
    """

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    updated_at: int
    full_object: bool
    is_enabled: bool
    disabled_at: int | None
    disabled_reason: str | None
    failing_since: int | None
    failures_in_a_row: int
    asked_again_at: int | None
    old_secret_expires_at: int | None

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> "EndpointOut":
        return cls(
            id=endpoint.id,
            created_at=unix(endpoint.created_at),
            name=endpoint.name,
            url=endpoint.url,
            event_types=endpoint.event_types,
            signing_secret_hint=signing.hint_of(endpoint.secret),
            updated_at=unix(endpoint.updated_at or endpoint.created_at),
            full_object=endpoint.wants_object,
            is_enabled=endpoint.is_enabled,
            disabled_at=unix(endpoint.disabled_at),
            disabled_reason=endpoint.disabled_reason,
            failing_since=unix(endpoint.failing_since),
            failures_in_a_row=endpoint.failures_in_a_row,
            asked_again_at=unix(endpoint.not_before),
            old_secret_expires_at=unix(endpoint.previous_secret_expires_at),
        )


class EndpointWithSecret(EndpointOut):
    """The answer to its creation and to a rotation, the only ones that tell the secret."""

    signing_secret: str

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> "EndpointWithSecret":
        return cls(**EndpointOut.of(endpoint).model_dump(), signing_secret=endpoint.secret)


class EndpointDeleted(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class EventTypeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventType] = list(EventType)


class SampleResult(BaseModel):
    """The SDK's WebhookEndpointTestResult; `error` and `milliseconds` are ours.

    `success` says that the receiver answered, and `status_code` what. `error` is null if a delivery would have counted as taken.
    """

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: EventType
    success: bool
    status_code: int | None
    error: str | None
    milliseconds: int

    @classmethod
    def of(cls, endpoint_id: str, event_type: EventType, outcome: Outcome) -> "SampleResult":
        return cls(
            webhook_endpoint_id=endpoint_id,
            event_type=event_type,
            success=outcome.status is not None,
            status_code=outcome.status,
            error=outcome.error,
            milliseconds=outcome.milliseconds,
        )


class DeliveryOut(BaseModel):
    """One message to one endpoint. `attempts` counts those of its present schedule, which a replay begins again."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    created_at: int
    event_id: str
    event_type: str
    status: DeliveryStatus
    attempts: int
    delivered_at: int | None
    next_attempt_at: int | None
    last_status: int | None
    last_error: str | None

    @classmethod
    def of(cls, delivery: WebhookDelivery) -> "DeliveryOut":
        return cls(
            id=delivery.id,
            created_at=unix(delivery.created_at),
            event_id=delivery.event_id,
            event_type=delivery.event_type,
            status=_status_of(delivery),
            attempts=delivery.attempts,
            delivered_at=unix(delivery.delivered_at),
            next_attempt_at=unix(delivery.next_attempt_at),
            last_status=delivery.last_status,
            last_error=delivery.last_error,
        )


class AttemptOut(BaseModel):
    """How one attempt went; `error` is null if the receiver took the message."""

    at: int
    status: int | None
    error: str | None
    milliseconds: int


class DeliveryDetail(DeliveryOut):
    """With the exact text that is sent, and the last ten attempts, oldest first, replays or not."""

    body: str
    recent_attempts: list[AttemptOut]

    @classmethod
    def of(cls, delivery: WebhookDelivery) -> "DeliveryDetail":
        shown = DeliveryOut.of(delivery).model_dump()
        return cls(**shown, body=delivery.body, recent_attempts=delivery.recent_attempts)


class RangeReplayed(BaseModel):
    """How many messages are sent again."""

    object: Literal["webhook_replay"] = "webhook_replay"
    replayed: int


def _status_of(delivery: WebhookDelivery) -> DeliveryStatus:
    if delivery.delivered_at:
        return DeliveryStatus.DELIVERED
    return DeliveryStatus.WAITING if delivery.next_attempt_at else DeliveryStatus.EXHAUSTED
