from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class UploadStatus(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(Owned, Table):
    """A file that comes in parts. `received_bytes` counts bytes that came twice once.

    `tried_file_ids` are those under which the whole was, or may have been, put together: all but `file_id` are to be removed.
    `sweep_at` is when an upload that is still pending expires, and when one that has ended is forgotten.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"),
        Index("ix_uploads_pending", "project_id", postgresql_where="status = 'pending'"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    file_expires_after_seconds: Mapped[int | None]
    status: Mapped[str] = mapped_column(default=UploadStatus.PENDING)
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    part_ids: Mapped[list[Any] | None]
    file_id: Mapped[str | None] = mapped_column(Id)
    tried_file_ids: Mapped[list[Any]] = mapped_column(default=list)
    expires_at: Mapped[datetime]
    sweep_at: Mapped[datetime] = mapped_column(index=True)


class UploadPart(Owned, Table):
    """A part in storage, until its upload ends. Parts of the same bytes share one object."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    upload_id: Mapped[str] = mapped_column(Id, ForeignKey("uploads.id"), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    storage_key: Mapped[str]
