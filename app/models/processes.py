from datetime import datetime
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class Process(Created, Table):
    """A relay or a worker, as it last told. `broker_at` is when the broker last answered it. A worker that works does
    not ask, and what it tells then is that nothing is amiss.

    `id` names host and process: there is one row for each, and engines have a table of their own.
    """

    __tablename__ = "processes"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    kind: Mapped[str]
    queues: Mapped[list[Any]]
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    broker_at: Mapped[datetime]
