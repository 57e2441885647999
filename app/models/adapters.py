from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, Index, UniqueConstraint, func, true
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class Adapter(Owned, Table):
    """A model: a public name for an immutable directory in storage. `step` is set for checkpoints only.

    `base_digest` is the one of its manifest; null, for models of before it was kept here, is a base held as usual.
    One that is not live answers nobody but the evaluation that its job's quality gate waits for.
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
    is_live: Mapped[bool] = mapped_column(server_default=true())


class ModelAlias(Owned, Table):
    """A name of the project's own, which stands for one model at a time. A rollback goes to `previous_version`."""

    __tablename__ = "model_aliases"
    __table_args__ = (UniqueConstraint("project_id", "name"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(Id)
    model: Mapped[str] = mapped_column(Id)
    version: Mapped[int]
    previous_version: Mapped[int | None]
    moved_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class AliasAction(StrEnum):
    """What was done to an alias. The first two make a version, the third goes back to one."""

    CREATED = "created"
    MOVED = "moved"
    ROLLED_BACK = "rolled_back"
    DELETED = "deleted"


class ModelAliasChange(Owned, Table):
    """What an alias was made to stand for, by which key and, where it was a job, by which. Rows are added and never changed: they
    outlive the alias, and go on counting if it is made again."""

    __tablename__ = "model_alias_changes"
    __table_args__ = (UniqueConstraint("project_id", "name", "sequence"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(Id)
    sequence: Mapped[int]
    action: Mapped[str]
    model: Mapped[str] = mapped_column(Id)
    version: Mapped[int]
    previous_version: Mapped[int | None]
    api_key_id: Mapped[str] = mapped_column(Id)
    job_id: Mapped[str | None] = mapped_column(Id)
