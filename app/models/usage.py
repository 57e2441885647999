from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class UsageRecord(Owned, Table):
    """Tokens of one inference request. Append-only; one row a request, also when the client left early."""

    __tablename__ = "usage_records"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    request_id: Mapped[str] = mapped_column(unique=True)
    api_key_id: Mapped[str] = mapped_column(Id)
    model: Mapped[str]
    base: Mapped[str]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
