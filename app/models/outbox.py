from datetime import datetime
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class OutboxMessage(Created, Table):
    """Something to do once the transaction that wrote this row has committed. The relay does it and deletes the row."""

    __tablename__ = "outbox"
    # the api role may write here but not read: no RETURNING
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012  # SQLAlchemy's own class attribute

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    topic: Mapped[str]
    payload: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp(), index=True)
