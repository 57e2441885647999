from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class FileStatus(StrEnum):
    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class File(Owned, Table):
    """An object in S3 and what is known of it. `not_before` keeps a second validator away from a file in hand."""

    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        Index("ix_files_to_validate", "not_before", postgresql_where="status = 'uploaded'"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    storage_key: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]
    expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
