from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class EvaluationState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNDECIDED = (EvaluationState.QUEUED, EvaluationState.RUNNING)


class Evaluation(Owned, Table):
    """A file's rows put to models, and graded. A cpu worker holds it by lease and attempt for a slice of the work, and lets go.

    `request` is what was asked for, `rows` the file's once they are known, `answered` how many of rows × models have been asked.
    `job_id` is that of the job whose quality gate it decides.
    """

    __tablename__ = "evaluations"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="lease_whole"),
        Index("ix_evaluations_due", "not_before", postgresql_where="state IN ('queued', 'running')"),
        Index("ix_evaluations_file_id", "file_id"),
        Index("ix_evaluations_job_id", "job_id", postgresql_where="job_id IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    api_key_id: Mapped[str] = mapped_column(Id)
    organization_slug: Mapped[str]
    name: Mapped[str | None]
    job_id: Mapped[str | None] = mapped_column(Id)
    state: Mapped[str] = mapped_column(default=EvaluationState.QUEUED)
    file_id: Mapped[str] = mapped_column(Id)
    request: Mapped[dict[str, Any]]
    rows: Mapped[int | None]
    answered: Mapped[int] = mapped_column(default=0)

    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    status_details: Mapped[str | None]
    results: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class EvaluationSample(Owned, Table):
    """What one model answered to one row, and how it was graded. `position` counts rows, and within a row models, from 0.

    `grades` and `verdict` are null until they are known. A row that a model could not be asked has an `error` and no `answer`.
    """

    __tablename__ = "evaluation_samples"
    __table_args__ = (UniqueConstraint("evaluation_id", "position"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    evaluation_id: Mapped[str] = mapped_column(Id, ForeignKey("evaluations.id"))
    position: Mapped[int]
    line: Mapped[int]
    model: Mapped[str]
    answer: Mapped[str | None]
    finish_reason: Mapped[str | None]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    error: Mapped[dict[str, Any] | None]
    grades: Mapped[dict[str, Any] | None]
    verdict: Mapped[dict[str, Any] | None]
