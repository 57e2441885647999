from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint, func, text, true
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Id, Owned, Table


class JobState(StrEnum):
    """Where a job is. Two are ours: the API shows `paused` as `queued` with `paused: true`, and `evaluating` as `running`.

    Of an evaluating job the model waits at the quality gate, and no worker is held.
    """

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    EVALUATING = "evaluating"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = (JobState.VALIDATING_FILES, JobState.QUEUED, JobState.RUNNING, JobState.EVALUATING, JobState.PAUSED)


class Desired(StrEnum):
    """What its owner wants of a running job; its worker hears it with the next heartbeat."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Job(Owned, Table):
    """A fine-tuning job. Postgres is the queue: workers claim rows, and hold them by lease and attempt number.

    `failures`, the steps and `deaths` are explained in app.jobs.life. `valid_loss` is that of the published adapter.
    `total_tokens` are those of all epochs, or of a supervised job that takes as long; `worker_seconds` what all attempts have
    taken. Of the running one are `claimed_at`, `charged_seconds`, what its organization was charged in advance, and `words`, how
    many of its worker's events are recorded. `trace` is the traceparent of the request that made it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name="running_has_lease"),
        CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="lease_whole"),
        CheckConstraint("desired IN ('run', 'pause', 'cancel')", name="desired"),
        # whoever ends it: a worker of an earlier release knows no gate
        CheckConstraint("state <> 'succeeded' OR quality_gate IS NULL OR quality_gate ->> 'stage' = 'passed'", name="gate_first"),
        Index("ix_jobs_in_turn", "queue", "organization_id", "queued_at", "id", postgresql_where="state = 'queued'"),
        Index("ix_jobs_leased", "lease_expires_at", postgresql_where="state = 'running'"),
        Index("ix_jobs_to_prepare", "not_before", postgresql_where="state = 'validating_files'"),
        Index("ix_jobs_training_file_id", "training_file_id"),
        Index("ix_jobs_evaluating", "id", postgresql_where="state = 'evaluating'"),
        Index("ix_jobs_sweep_id", "sweep_id", postgresql_where="sweep_id IS NOT NULL"),
        Index("ix_jobs_counted", "state", "attempt"),  # so that counting them all reads no job
        Index("ix_jobs_continue_from", "continue_from", postgresql_where="continue_from IS NOT NULL"),
        Index("ix_jobs_listed", "organization_id", "project_id", "id"),
        Index("ix_jobs_unfinished", "organization_id", "id", postgresql_where=f"state IN {tuple(map(str, UNFINISHED))}"),
        Index("ix_jobs_ended", "organization_id", "project_id", "finished_at", postgresql_include=["state", "trained_tokens"]),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    api_key_id: Mapped[str] = mapped_column(Id)
    organization_slug: Mapped[str]
    state: Mapped[str]
    desired: Mapped[str] = mapped_column(default=Desired.RUN)

    requested_model: Mapped[str]
    base: Mapped[str]
    training_file_id: Mapped[str] = mapped_column(Id)
    validation_file_id: Mapped[str | None] = mapped_column(Id)
    continue_from: Mapped[str | None] = mapped_column(Id)
    sweep_id: Mapped[str | None] = mapped_column(Id)
    suffix: Mapped[str | None]
    seed: Mapped[int]
    user_metadata: Mapped[dict[str, Any] | None]
    integrations: Mapped[list[Any] | None]
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[str]
    spec: Mapped[dict[str, Any] | None]
    plan: Mapped[dict[str, Any] | None]
    datasets: Mapped[dict[str, Any] | None]
    data_report: Mapped[dict[str, Any] | None]
    quality_gate: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    alias: Mapped[str | None]
    trace: Mapped[str | None]

    queue: Mapped[str]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    step: Mapped[int] = mapped_column(default=0)
    attempt_step: Mapped[int | None]
    died_at_step: Mapped[int | None]
    deaths: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    event_count: Mapped[int] = mapped_column(default=0)

    claimed_at: Mapped[datetime | None]
    charged_seconds: Mapped[float | None]
    words: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    worker_seconds: Mapped[float] = mapped_column(server_default=text("0"))
    total_tokens: Mapped[int | None] = mapped_column(BigInteger)

    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None]
    valid_loss: Mapped[float | None]
    result_file_id: Mapped[str | None] = mapped_column(Id)
    further_result_file_ids: Mapped[list[Any] | None]
    held_out: Mapped[dict[str, Any] | None]
    examined: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    estimated_finish_at: Mapped[datetime | None]
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEvent(Owned, Table):
    """What happened to a job, in order: `sequence` counts from 1 without a gap."""

    __tablename__ = "job_events"
    __table_args__ = (
        UniqueConstraint("job_id", "sequence"),
        Index("ix_job_events_messages", "job_id", "sequence", postgresql_where="type = 'message'"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    sequence: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class JobCheckpoint(Owned, Table):
    """A checkpoint whose bytes are all in storage and verified: the row comes last.

    Under `prefix` lie `adapter` and, for as long as the job may have to go on from it (`has_state`), `state`.
    """

    __tablename__ = "job_checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    step: Mapped[int]
    attempt: Mapped[int]
    prefix: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    fine_tuned_model: Mapped[str]
    has_state: Mapped[bool] = mapped_column(server_default=true())


class JobFollower(Owned, Table):
    """How far a tracker has been told of a job. `next_attempt_at` is null once it has been told everything, or was given up.

    A claim counts `claims` up: whoever comes with an older count writes nothing. `failures` are those since the last success.
    """

    __tablename__ = "job_followers"
    __table_args__ = (
        UniqueConstraint("job_id", "type"),
        Index("ix_job_followers_due", "type", "next_attempt_at", postgresql_where="next_attempt_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    type: Mapped[str]
    step: Mapped[int] = mapped_column(default=-1)
    run: Mapped[dict[str, Any] | None]
    claims: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime | None] = mapped_column(server_default=func.clock_timestamp())
