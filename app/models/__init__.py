"""Every table. Relationships are not mapped: services say which rows they read."""

from app.models.accounts import ApiKey, Organization, Project
from app.models.adapters import Adapter
from app.models.base import Table
from app.models.derived import Derived
from app.models.engines import Engine
from app.models.evaluations import Evaluation, EvaluationSample, EvaluationState
from app.models.files import File, FileStatus
from app.models.jobs import Desired, Job, JobCheckpoint, JobEvent, JobFollower, JobState
from app.models.outbox import OutboxMessage
from app.models.queues import QueueClock, QueueShare, Throughput
from app.models.sweeps import Sweep
from app.models.usage import UsageRecord
from app.models.webhooks import WebhookDelivery, WebhookEndpoint

__all__ = [
    "Adapter",
    "ApiKey",
    "Derived",
    "Desired",
    "Engine",
    "Evaluation",
    "EvaluationSample",
    "EvaluationState",
    "File",
    "FileStatus",
    "Job",
    "JobCheckpoint",
    "JobEvent",
    "JobFollower",
    "JobState",
    "Organization",
    "OutboxMessage",
    "Project",
    "QueueClock",
    "QueueShare",
    "Sweep",
    "Table",
    "Throughput",
    "UsageRecord",
    "WebhookDelivery",
    "WebhookEndpoint",
]
