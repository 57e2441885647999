"""The train queues as a customer sees them: how many wait and run, its own places, and when their turn is likely to come."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import TIMESTAMP, BigInteger, Text, cast, column, func, orm, select
from sqlalchemy.dialects.postgresql import ARRAY

from app.accounts.caller import Caller
from app.models import Job, JobState


@dataclass(frozen=True)
class Place:
    """1 is claimed next. Instants are those of the order as it is now, and None where nothing was measured to tell them by."""

    queue: str
    position: int
    starts_at: datetime | None
    ends_at: datetime | None


@dataclass(frozen=True)
class Queue:
    """One tier's queue. `waiting` and `running` count everybody's jobs; `jobs` are the caller's, in the order of their turns.

    `next` is where one would stand that came now.
    """

    id: str
    waiting: int
    running: int
    next: Place
    jobs: Sequence[tuple[Job, Place | None]]


def places(session: orm.Session, jobs: Iterable[Job]) -> dict[str, Place]:
    """By id, of those of the jobs that wait for a worker. They are of the organization that this session is for."""
    waiting = {job.id: job.queue for job in jobs if job.state == JobState.QUEUED}
    told = _places(session, set(waiting.values())) if waiting else ()
    return {job_id: place for job_id, place in told if job_id in waiting}


def place_of_next(session: orm.Session, queue: str) -> Place:
    """Where a job of this session's organization would stand if it came now. When it would end is another question."""
    return next(place for job_id, place in _places(session, {queue}) if job_id is None)


def list_queues(session: orm.Session, caller: Caller, *, among: Collection[str], most: int) -> list[Queue]:
    """Of the tiers `among` which this installation chooses, and whatever other still has jobs; the smallest tier first.

    With `most` of the caller's jobs in each.
    """
    loads = {queue: (waiting, running) for queue, waiting, running in session.execute(_LOADS)}
    names = sorted({*loads, *(f"train.{tier}" for tier in among)}, key=_size)
    told = _places(session, names)
    following = {place.queue: place for job_id, place in told if job_id is None}
    placed = {job_id: place for job_id, place in told if job_id is not None}
    mine = {name: _first(session, caller, name, placed, most) for name in names}
    return [Queue(name, *loads.get(name, (0, 0)), next=following[name], jobs=mine[name]) for name in names]


def _first(
    session: orm.Session, caller: Caller, queue: str, placed: Mapping[str, Place], most: int
) -> list[tuple[Job, Place | None]]:
    """The caller's jobs that run, then those that wait. A job's reports may be long, and are not read for it."""
    unfinished = Job.state.in_((JobState.QUEUED, JobState.RUNNING))
    mine = Job.organization_id == caller.organization_id, Job.project_id == caller.project_id, Job.queue == queue, unfinished
    in_turn = sorted(session.scalars(select(Job.id).where(*mine)), key=lambda job_id: _in_turn(job_id, placed))
    shown = orm.load_only(Job.id, Job.state, Job.estimated_finish_at)
    jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(in_turn[:most])).options(shown))}
    return [(jobs[job_id], placed.get(job_id)) for job_id in in_turn[:most]]


_LOADS = select(
    func.queue_loads().table_valued(column("queue", Text), column("waiting", BigInteger), column("running", BigInteger))
)


def _places(session: orm.Session, queues: Collection[str]) -> list[tuple[str | None, Place]]:
    """The database's own function: it sees all that wait, and tells this organization's places only."""
    told = func.queue_places(cast(sorted(queues), ARRAY(Text))).table_valued(
        column("queue", Text),
        column("job_id", Text),
        column("place", BigInteger),
        column("starts_at", TIMESTAMP(timezone=True)),
        column("ends_at", TIMESTAMP(timezone=True)),
    )
    rows = session.execute(select(told))
    return [(row.job_id, Place(row.queue, row.place, row.starts_at, row.ends_at)) for row in rows]


def _in_turn(job_id: str, placed: Mapping[str, Place]) -> tuple[int, str]:
    return placed[job_id].position if job_id in placed else 0, job_id


def _size(queue: str) -> int:
    tier = queue.removeprefix("train.")
    return int(tier) if tier.isdecimal() else 0
