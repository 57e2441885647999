from datetime import datetime
from typing import Any

from sqlalchemy import Index, func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Created, Id, Table


class Derived(Created, Table):
    """Something worked out from a file's bytes; `key` tells from what and how. Whole once it has `facts`.

    What is too large for a row lies in storage, where nobody looks for it but through this row.
    """

    __tablename__ = "derived"
    __table_args__ = (
        Index("uq_derived_key", "organization_id", "key", unique=True, postgresql_where="facts IS NOT NULL"),
        Index("ix_derived_file", "organization_id", "file_sha256"),
        Index("ix_derived_last_used_at", "last_used_at"),
        Index("ix_derived_abandoned", "created_at", postgresql_where="facts IS NULL"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    organization_id: Mapped[str] = mapped_column(Id)
    key: Mapped[str]
    file_sha256: Mapped[str]
    storage_key: Mapped[str | None]
    sha256: Mapped[str | None]
    facts: Mapped[dict[str, Any] | None]
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
