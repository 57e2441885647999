from sqlalchemy import BigInteger, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class Adapter(Owned, Table):
    """A published model: a public name for an immutable directory in storage. `step` is set for checkpoints only.

    `base_digest` is the one of its manifest; null, for models of before it was kept here, is a base held as usual.
    """

    __tablename__ = "adapters"
    __table_args__ = (Index("uq_adapters_job_id_final", "job_id", unique=True, postgresql_where="step IS NULL"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(Id, unique=True)
    base: Mapped[str]
    base_digest: Mapped[str | None]
    job_id: Mapped[str] = mapped_column(Id)
    step: Mapped[int | None]
    digest: Mapped[str]
    prefix: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
