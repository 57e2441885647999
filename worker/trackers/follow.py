"""Tells trackers of jobs, one cursor at a time. Training knows nothing of it: what is told is read from the job's events.

It runs in the relay, which already sends from rows with retries and needs neither broker nor torch: a tracker that hangs would
keep a cpu worker from validating files, and a train worker from its next job.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from app.jobs import integrations, tracking
from app.jobs.tracking import Due, Run
from worker.services import Services
from worker.trackers import mlflow, wandb
from worker.trackers.failure import TrackerFailed

log = structlog.get_logger()


@dataclass(frozen=True)
class Tracker:
    """`at_once` jobs are told of in one process; each is looked at again after `every`."""

    tell: Callable[[Due, Services], Awaitable[Run]]
    at_once: int
    every: timedelta


TRACKERS: Final[Mapping[str, Tracker]] = {
    "mlflow": Tracker(mlflow.tell, at_once=4, every=timedelta(seconds=5)),
    "wandb": Tracker(wandb.tell, at_once=2, every=timedelta(seconds=20)),  # each time a process of its own
}


async def tell_next(to: Services, type: str) -> bool:
    """Tell a tracker of this type what it has not heard of one job. False when none is due."""
    due = await asyncio.to_thread(_claim, to, type)
    if due is None:
        return False
    tracker, run, reason = TRACKERS[type], due.run, None
    if not due.is_empty:
        try:
            run = await _tell(tracker, due, to)
        except TrackerFailed as failure:
            reason = str(failure)
            log.warning("tracker_failed", tracker=type, job_id=due.job_id, failures=due.failures + 1, reason=failure.detail)
    await asyncio.to_thread(_settle, to, due, run, reason, tracker.every)
    return True


async def _tell(tracker: Tracker, due: Due, to: Services) -> Run:
    if due.type not in integrations.offered(to.settings):
        raise TrackerFailed("this installation does not report there any more")
    run = await tracker.tell(due, to)
    log.info("tracker_told", tracker=due.type, job_id=due.job_id, points=len(due.points), is_last=due.ending is not None)
    return run


def _claim(to: Services, type: str) -> Due | None:
    with to.sessions.begin() as session:
        return tracking.claim(session, type)


def _settle(to: Services, due: Due, run: Run | None, reason: str | None, every: timedelta) -> None:
    with to.sessions.begin() as session:
        if reason is None:
            tracking.told(session, due, run, again_in=every)
        else:
            tracking.failed(session, due, reason=reason)
