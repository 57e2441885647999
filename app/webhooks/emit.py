"""Tell a project's endpoints what happened, in the transaction in which it happened."""

import json
import time
from enum import StrEnum

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


def emit(session: orm.Session, *, organization_id: str, project_id: str, type: EventType, data_id: str) -> None:
    """Write one message for each endpoint that wants to know, its bytes fixed for every attempt. The relay sends them."""
    endpoint_ids = session.scalars(
        select(WebhookEndpoint.id)
        .where(
            WebhookEndpoint.organization_id == organization_id,
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.is_enabled,
            WebhookEndpoint.event_types.contains([type.value]),
        )
        .order_by(WebhookEndpoint.id)
        .with_for_update(read=True, key_share=True)  # one deleted meanwhile would fail the caller's transaction
    ).all()
    if not endpoint_ids:
        return
    event_id = ids.new("evt_")
    event = {"id": event_id, "object": "event", "created_at": int(time.time()), "type": type.value, "data": {"id": data_id}}
    session.add_all(
        WebhookDelivery(
            id=ids.new("msg_"),
            organization_id=organization_id,
            project_id=project_id,
            endpoint_id=endpoint_id,
            event_id=event_id,
            event_type=type.value,
            body=json.dumps(event),
        )
        for endpoint_id in endpoint_ids
    )
    outbox.notify(session)
