from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class IdempotentAnswer(Owned, Table):
    """What a request with an `Idempotency-Key` was answered. It is written in the transaction that did what was asked.

    Without a status the transaction is still under way, and nobody but itself sees the row.
    """

    __tablename__ = "idempotent_answers"
    __table_args__ = (UniqueConstraint("project_id", "key"), Index("ix_idempotent_answers_created_at", "created_at"))

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    key: Mapped[str]
    request_sha256: Mapped[str]
    status: Mapped[int | None]
    media_type: Mapped[str | None]
    body: Mapped[str | None]
