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
    SUCCEEDED = "fine_tuning.job.succeeded"
    FAILED = "fine_tuning.job.failed"
    CANCELLED = "fine_tuning.job.cancelled"


def emit(session: orm.Session, *, organization_id: str, project_id: str, type: EventType, data_id: str) -> None:
    endpoints = session.scalars(
        select(WebhookEndpoint).where(
            WebhookEndpoint.organization_id == organization_id,
            WebhookEndpoint.project_id == project_id,
            WebhookEndpoint.is_enabled,
            WebhookEndpoint.event_types.contains([type.value]),
        )
    ).all()
    if not endpoints:
        return
    event_id = ids.new("evt_")
    body = json.dumps(
        {"id": event_id, "object": "event", "created_at": int(time.time()), "type": type.value, "data": {"id": data_id}}
    )
    for endpoint in endpoints:
        session.add(
            WebhookDelivery(
                id=ids.new("msg_"),
                organization_id=organization_id,
                project_id=project_id,
                endpoint_id=endpoint.id,
                event_id=event_id,
                event_type=type.value,
                body=body,
            )
        )
    outbox.notify(session)
