from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint, false, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class DisabledReason(StrEnum):
    """Why an endpoint is told nothing."""

    REQUESTED = "requested"
    FAILING = "failing"


class WebhookEndpoint(Owned, Table):
    """Where a project wants to be told. The secrets are needed in the clear: they sign.

    One with `deleted_at` is shown to nobody, and disabled; it goes once its deliveries have gone, which may be many.
    Whoever locks an endpoint and its deliveries locks the endpoint first.
    """

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    wants_object: Mapped[bool] = mapped_column(server_default=false())
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_secret_expires_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    is_enabled: Mapped[bool] = mapped_column(default=True)
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    failing_since: Mapped[datetime | None]
    failures_in_a_row: Mapped[int] = mapped_column(server_default=text("0"))
    not_before: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]


class WebhookDelivery(Owned, Table):
    """One event for one endpoint. `id` is the message id, `body` the same bytes at every attempt, `trace` its job's.

    `attempts` counts those of the present schedule, which a replay begins again; `recent_attempts` knows of those before it.
    While `lease_expires_at` is to come, somebody may be sending it.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("endpoint_id", "event_id"),
        Index("ix_webhook_deliveries_waiting", "endpoint_id", "next_attempt_at", postgresql_where="next_attempt_at IS NOT NULL"),
        Index("ix_webhook_deliveries_leased", "endpoint_id", postgresql_where="lease_expires_at IS NOT NULL"),
        Index("ix_webhook_deliveries_of_organization", "organization_id", postgresql_where="lease_expires_at IS NOT NULL"),
        Index("ix_webhook_deliveries_listed", "endpoint_id", "id"),
        Index(None, "endpoint_id", "created_at"),
        Index("ix_webhook_deliveries_exhausted", "id", postgresql_where="next_attempt_at IS NULL AND delivered_at IS NULL"),
        Index(None, "created_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(Id, ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    event_id: Mapped[str] = mapped_column(Id)
    event_type: Mapped[str]
    body: Mapped[str]
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime | None] = mapped_column(server_default=func.clock_timestamp())
    lease_expires_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    recent_attempts: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))
    trace: Mapped[str | None]
