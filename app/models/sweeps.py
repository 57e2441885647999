from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class Sweep(Owned, Table):
    """Jobs that were made together to find the best of them: they name it as their `sweep_id`.

    `request` is what it was asked for beside the job: random, metric, the seed that its jobs share, and the grid as pairs, since
    JSONB does not keep the order of names. `trials` holds, in the order of the grid, each job's id and what of it that has got.
    """

    __tablename__ = "sweeps"
    __table_args__ = (Index("ix_sweeps_retried", "api_key_id", "request_sha256"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    api_key_id: Mapped[str] = mapped_column(Id)
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[str]
    trials: Mapped[list[Any]]
