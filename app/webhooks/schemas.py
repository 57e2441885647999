from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.core.clock import unix
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import signing
from app.webhooks.emit import EventType

Name = Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
EventTypes = Annotated[list[EventType], Field(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EndpointCreate(_Request):
    """Without `event_types`, the endpoint is told of everything."""

    url: str
    event_types: EventTypes = list(EventType)
    name: Name = ""


class EndpointUpdate(_Request):
    """What is absent stays as it is."""

    url: str | None = None
    event_types: EventTypes | None = None
    name: Name | None = None
    is_enabled: bool | None = None


class EndpointOut(BaseModel):
    """The SDK's WebhookEndpoint; `is_enabled` is ours."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    is_enabled: bool

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> "EndpointOut":
        return cls(
            id=endpoint.id,
            created_at=unix(endpoint.created_at),
            name=endpoint.name,
            url=endpoint.url,
            event_types=endpoint.event_types,
            signing_secret_hint=signing.hint_of(endpoint.secret),
            is_enabled=endpoint.is_enabled,
        )


class EndpointWithSecret(EndpointOut):
    """The answer to its creation, the only one that tells the secret."""

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


class DeliveryOut(BaseModel):
    """One message to one endpoint. Neither `delivered_at` nor `next_attempt_at`: its attempts are exhausted."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    created_at: int
    event_id: str
    event_type: str
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
            attempts=delivery.attempts,
            delivered_at=unix(delivery.delivered_at),
            next_attempt_at=unix(delivery.next_attempt_at),
            last_status=delivery.last_status,
            last_error=delivery.last_error,
        )
