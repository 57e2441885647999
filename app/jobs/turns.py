"""Whose turn it is in a train queue: fair between organizations, by age within one (docs/decisions/0013).

Start-time fair queueing (Goyal, Vin, Cheng, 1996), a job for a packet. A claim charges its organization what the job is expected
to take, over the organization's weight: its next job starts where, in the queue's virtual time, that share is used up. The
earliest start is claimed first, and becomes the queue's time: whoever comes anew starts there, with neither credit nor debt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CTE, ColumnElement, and_, func, orm, select, true, update
from sqlalchemy.dialects.postgresql import insert

from app.jobs import throughput
from app.models import Desired, Job, JobState, Organization, QueueClock, QueueShare

UNKNOWN_SECONDS = 600.0  # what a job is charged in advance where none of its base has been finished in its queue


@dataclass(frozen=True)
class _Turn:
    """An organization with jobs that wait. `starts_at` is in virtual seconds."""

    organization_id: str
    weight: float
    starts_at: float
    first_queued_at: datetime


def take(session: orm.Session, queue: str) -> Job | None:
    """The job whose turn it is, locked and charged to its organization; None when none waits. The caller makes it run."""
    if session.scalar(select(Job.id).where(_claimable(queue)).limit(1)) is None:
        return None
    clock = _held_clock(session, queue)
    for turn in sorted(_turns(session, clock), key=lambda turn: (turn.starts_at, turn.first_queued_at)):
        mine = _claimable(queue), Job.organization_id == turn.organization_id
        query = select(Job).where(*mine).order_by(Job.queued_at, Job.id).limit(1).with_for_update(skip_locked=True)
        if job := session.scalar(query.execution_options(populate_existing=True)):
            clock.virtual_seconds = turn.starts_at
            _charge(session, job, turn)
            return job
    return None


def settle(session: orm.Session, job: Job) -> None:
    """The job leaves its worker: its organization is charged what it has taken, and not what was expected."""
    if job.claimed_at is None or job.charged_seconds is None:  # an earlier release has claimed it
        return
    taken = func.extract("epoch", func.clock_timestamp() - Job.claimed_at)
    taken_seconds = float(session.scalars(select(taken).where(Job.id == job.id)).one())
    weight = select(Organization.weight).where(Organization.id == job.organization_id).scalar_subquery()
    mine = QueueShare.queue == job.queue, QueueShare.organization_id == job.organization_id
    used_until = QueueShare.used_until + (taken_seconds - job.charged_seconds) / weight
    for change in (  # the clock first, as a claim locks them
        update(QueueClock).where(QueueClock.queue == job.queue).values(released_at=func.clock_timestamp()),
        update(QueueShare).where(*mine).values(used_until=used_until),
    ):
        session.execute(change, execution_options={"synchronize_session": False})
    job.worker_seconds += taken_seconds
    job.claimed_at = job.charged_seconds = None


def claimable(since: Any) -> ColumnElement[bool]:
    """Whether a job waits for a worker, since this instant at the latest."""
    return and_(Job.state == JobState.QUEUED, Job.desired == Desired.RUN, Job.not_before <= since)


def _claimable(queue: str) -> ColumnElement[bool]:
    return and_(Job.queue == queue, claimable(func.clock_timestamp()))


def _held_clock(session: orm.Session, queue: str) -> QueueClock:
    """Until the commit nobody else claims from this queue: two at once would see the same turn."""
    session.execute(insert(QueueClock).values(queue=queue).on_conflict_do_nothing())
    held = select(QueueClock).where(QueueClock.queue == queue).with_for_update()
    return session.scalars(held.execution_options(populate_existing=True)).one()


def _turns(session: orm.Session, clock: QueueClock) -> Iterator[_Turn]:
    """One for each organization with a claimable job, in no order."""
    waiting, share = _organizations(clock.queue), QueueShare
    mine = _claimable(clock.queue), Job.organization_id == waiting.c.organization_id
    oldest = select(Job.queued_at).where(*mine).order_by(Job.queued_at, Job.id).limit(1).lateral()
    rows = session.execute(
        select(Organization.id, Organization.weight, func.coalesce(share.used_until, 0), oldest.c.queued_at)
        .select_from(waiting)
        .join(oldest, true())
        .join(Organization, Organization.id == waiting.c.organization_id)
        .outerjoin(share, and_(share.queue == clock.queue, share.organization_id == Organization.id))
    ).all()
    if rows:
        now = _virtual_now(session, clock, first_queued_at=min(row.queued_at for row in rows))
    for organization_id, weight, used_until, first_queued_at in rows:
        yield _Turn(organization_id, weight, max(now, used_until), first_queued_at)


def _organizations(queue: str) -> CTE:
    """Those with a job that waits, each found behind the one before it in the index: all jobs would be many more."""
    waiting = select(func.min(Job.organization_id)).where(Job.queue == queue, Job.state == JobState.QUEUED)
    found = select(waiting.scalar_subquery().label("organization_id")).cte(recursive=True)
    behind = waiting.where(Job.organization_id > found.c.organization_id).correlate(found).scalar_subquery()
    return found.union_all(select(behind).where(found.c.organization_id.is_not(None)))


def _virtual_now(session: orm.Session, clock: QueueClock, *, first_queued_at: datetime) -> float:
    """Where a newcomer starts. A queue that was empty, no worker at it, begins anew: what was used before was in nobody's way."""
    is_empty_since = clock.released_at is None or clock.released_at <= first_queued_at
    running = select(Job.id).where(Job.queue == clock.queue, Job.state == JobState.RUNNING).limit(1)
    if is_empty_since and session.scalar(running) is None:
        last = session.scalar(select(func.max(QueueShare.used_until)).where(QueueShare.queue == clock.queue))
        return max(clock.virtual_seconds, last or 0.0)
    return clock.virtual_seconds


def _charge(session: orm.Session, job: Job, turn: _Turn) -> None:
    expected = throughput.expected_seconds(session, job)
    job.charged_seconds = UNKNOWN_SECONDS if expected is None else expected
    job.claimed_at = func.clock_timestamp()
    used = {"used_until": turn.starts_at + job.charged_seconds / turn.weight}
    share = insert(QueueShare).values(queue=job.queue, organization_id=job.organization_id, **used)
    session.execute(share.on_conflict_do_update(index_elements=[QueueShare.queue, QueueShare.organization_id], set_=used))
