from datetime import datetime
from typing import Any

from sqlalchemy import func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class Engine(Created, Table):
    """A running inference engine, as its last heartbeat told. No heartbeat for a while: not routed to."""

    __tablename__ = "engines"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    url: Mapped[str]
    base: Mapped[str] = mapped_column(index=True)
    base_digest: Mapped[str]
    quantization: Mapped[str] = mapped_column(server_default=text("'nf4'"))
    running: Mapped[int]
    waiting: Mapped[int]
    adapters: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
