from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class QueueClock(Table):
    """A train queue's virtual time, in worker-seconds of an organization of weight 1: see app/jobs/turns.py.

    Whoever claims from the queue holds this row, so that claims take turns. `released_at`: when a worker last let go of a job.
    """

    __tablename__ = "queue_clocks"

    queue: Mapped[str] = mapped_column(primary_key=True)
    virtual_seconds: Mapped[float] = mapped_column(server_default=text("0"))
    released_at: Mapped[datetime | None]


class QueueShare(Table):
    """Until when, in the queue's virtual time, an organization has had its share."""

    __tablename__ = "queue_shares"

    queue: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(Id, ForeignKey("organizations.id"), primary_key=True)
    used_until: Mapped[float]


class Throughput(Created, Table):
    """What a finished job was, and how long workers had it: the last few of each base in each queue."""

    __tablename__ = "throughputs"
    __table_args__ = (Index("ix_throughputs_queue_base", "queue", "base", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    queue: Mapped[str]
    base: Mapped[str]
    tokens: Mapped[int] = mapped_column(BigInteger)
    worker_seconds: Mapped[float]
