"""Every table. Relationships are not mapped: services say which rows they read."""

from app.models.accounts import ApiKey, Organization, Project, SignIn, SignInLink, User
from app.models.adapters import Adapter, AliasAction, ModelAlias, ModelAliasChange
from app.models.base import Table
from app.models.derived import Derived
from app.models.engines import Engine
from app.models.evaluations import Evaluation, EvaluationSample, EvaluationState
from app.models.files import File, FileStatus
from app.models.idempotency import IdempotentAnswer
from app.models.jobs import Desired, Job, JobCheckpoint, JobEvent, JobFollower, JobState
from app.models.outbox import OutboxMessage
from app.models.processes import Process
from app.models.queues import QueueClock, QueueShare, Throughput
from app.models.snapshots import Snapshot
from app.models.sweeps import Sweep
from app.models.uploads import Upload, UploadPart, UploadStatus
from app.models.usage import UsageRecord
from app.models.webhooks import DisabledReason, WebhookDelivery, WebhookEndpoint

__all__ = [
    "Adapter",
    "AliasAction",
    "ApiKey",
    "Derived",
    "Desired",
    "DisabledReason",
    "Engine",
    "Evaluation",
    "EvaluationSample",
    "EvaluationState",
    "File",
    "FileStatus",
    "IdempotentAnswer",
    "Job",
    "JobCheckpoint",
    "JobEvent",
    "JobFollower",
    "JobState",
    "ModelAlias",
    "ModelAliasChange",
    "Organization",
    "OutboxMessage",
    "Process",
    "Project",
    "QueueClock",
    "QueueShare",
    "SignIn",
    "SignInLink",
    "Snapshot",
    "Sweep",
    "Table",
    "Throughput",
    "Upload",
    "UploadPart",
    "UploadStatus",
    "UsageRecord",
    "User",
    "WebhookDelivery",
    "WebhookEndpoint",
]
