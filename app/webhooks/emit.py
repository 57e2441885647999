"""Tell a project's endpoints what happened, in the transaction in which it happened."""

import json
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel
from sqlalchemy import orm, select

from app import outbox
from app.core import ids
from app.models import WebhookDelivery, WebhookEndpoint


class EventType(StrEnum):
    """What an endpoint can subscribe to."""

    CREATED = "fine_tuning.job.created"
    STARTED = "fine_tuning.job.started"
    CHECKPOINT = "fine_tuning.job.checkpoint"
    PAUSED = "fine_tuning.job.paused"
    SUCCEEDED = "fine_tuning.job.succeeded"
    FAILED = "fine_tuning.job.failed"
    CANCELLED = "fine_tuning.job.cancelled"
    ENDPOINT_DISABLED = "webhook_endpoint.disabled"


def emit(
    session: orm.Session,
    *,
    organization_id: str,
    project_id: str,
    type: EventType,
    data_id: str,
    describe: Callable[[], BaseModel] | None = None,
    trace: str | None = None,
) -> None:
    """Write one message for each endpoint that wants to know, its bytes fixed for every attempt. The relay sends them.

    `describe` gives the object as the API shows it; it is asked if an endpoint wants all of it and not just its id.
    `trace` is the traceparent of what they come from.
    """
    endpoints = session.execute(
        select(WebhookEndpoint.id, WebhookEndpoint.wants_object)
        .where(
            WebhookEndpoint.organization_id == organization_id,
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.is_enabled,
            WebhookEndpoint.event_types.contains([type.value]),
        )
        .order_by(WebhookEndpoint.id)
        .with_for_update(read=True, key_share=True)  # one deleted meanwhile would fail the caller's transaction
    ).all()
    if not endpoints:
        return
    event_id = ids.new("evt_")
    brief = body_of(event_id, type, data={"id": data_id})
    is_wanted = any(wants_object for _, wants_object in endpoints)
    whole = body_of(event_id, type, data=describe().model_dump(mode="json")) if describe and is_wanted else brief
    session.add_all(
        WebhookDelivery(
            id=ids.new("msg_"),
            organization_id=organization_id,
            project_id=project_id,
            endpoint_id=endpoint_id,
            event_id=event_id,
            event_type=type.value,
            body=whole if wants_object else brief,
            trace=trace,
        )
        for endpoint_id, wants_object in endpoints
    )
    outbox.notify(session)


def body_of(event_id: str, type: EventType, *, data: dict[str, Any]) -> str:
    """What receivers are told, as JSON."""
    event = {"id": event_id, "object": "event", "created_at": int(time.time()), "type": type.value, "data": data}
    return json.dumps(event)
