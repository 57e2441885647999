from datetime import datetime
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class Snapshot(Created, Table):
    """How things stood in the whole installation when the relay last looked: one row, since the API may not look itself."""

    __tablename__ = "snapshots"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    told: Mapped[dict[str, Any]]
    taken_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
