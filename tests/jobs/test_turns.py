"""Turns between organizations: simulated days of real claims, and the bound on waiting that docs/decisions/0013 states."""

import heapq
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from sqlalchemy import delete, func, orm, select, update

from app import db
from app.accounts.caller import Caller
from app.core import ids
from app.jobs import leases, queue, throughput, turns
from app.jobs.leases import Lease
from app.models import Job, JobState, Organization, QueueClock, QueueShare, Throughput
from tests import make
from tests.conftest import make_organization

Sessions = orm.sessionmaker[orm.Session]
SPEED = 100.0  # tokens a second, of every job here


@pytest.fixture
def session(system_sessions: Sessions) -> Iterator[orm.Session]:
    with system_sessions() as opened:
        yield opened
        opened.rollback()


@dataclass
class Line:
    """A train queue of its own, in which every job takes as long as its tokens say. Time is the test's: `now` is in seconds."""

    session: orm.Session
    sessions: Sessions
    workers: int = 1
    name: str = field(default_factory=lambda: f"train.{ids.new('q')}")
    now: float = 0.0
    lasts: dict[str, float] = field(default_factory=dict)  # by job
    came: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    running: list[tuple[float, str, Lease]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session.add(
            Throughput(id=ids.new("tp_"), queue=self.name, base=make.TINY, tokens=round(100 * SPEED), worker_seconds=100.0)
        )

    def organization(self, weight: float = 1.0) -> Caller:
        caller = make_organization(self.sessions)
        mine = update(Organization).where(Organization.id == caller.organization_id)
        self.session.execute(mine.values(weight=weight))
        return caller

    def add(self, caller: Caller, seconds: float, **changes: object) -> Job:
        job = Job(
            **{
                "id": ids.new("ftjob-"),
                "organization_id": caller.organization_id,
                "project_id": caller.project_id,
                "api_key_id": caller.key_id,
                "organization_slug": caller.organization_slug,
                "state": JobState.QUEUED,
                "requested_model": make.TINY,
                "base": make.TINY,
                "training_file_id": "file-none",
                "seed": 1,
                "request": {},
                "request_sha256": "",
                "queue": self.name,
                "queued_at": func.clock_timestamp(),
                "total_tokens": round(seconds * SPEED),
                **changes,
            }
        )
        self.session.add(job)
        self.session.flush()
        self.lasts[job.id], self.came[job.id] = seconds, self.now
        return job

    def claim(self) -> str | None:
        lease = leases.claim(self.session, self.name, owner="w", settings=make.LEASES)
        if lease is None:
            return None
        self.left[lease.job_id] = self.now
        heapq.heappush(self.running, (self.now + self.lasts[lease.job_id], lease.job_id, lease))
        return lease.job_id

    def fill(self) -> list[str]:
        """Every idle worker looks for a job."""
        taken = []
        while len(self.running) < self.workers and (job_id := self.claim()):
            taken.append(job_id)
        return taken

    def end_next(self) -> None:
        """Time goes on to the end of the job that ends first."""
        self.now, job_id, lease = heapq.heappop(self.running)
        started_at = func.clock_timestamp() - timedelta(seconds=self.lasts[job_id])
        self.session.execute(update(Job).where(Job.id == job_id).values(claimed_at=started_at))
        leases.fail(self.session, lease, code="over", message="It is over")

    def run_until_empty(self) -> list[str]:
        order = self.fill()
        while self.running:
            self.end_next()
            order += self.fill()
        return order


@pytest.fixture
def line(session: orm.Session, system_sessions: Sessions) -> Line:
    return Line(session, system_sessions)


def test_within_an_organization_it_is_by_age(line: Line) -> None:
    mine = line.organization()
    jobs = [line.add(mine, seconds).id for seconds in (50, 10, 900, 1)]

    assert line.run_until_empty() == jobs


def test_a_newcomer_is_next_however_many_wait(line: Line) -> None:
    heavy, newcomer = line.organization(), line.organization()
    waiting = [line.add(heavy, 100).id for _ in range(20)]
    assert line.fill() == waiting[:1]
    line.end_next()
    line.fill()
    line.end_next()
    one = line.add(newcomer, 100).id

    assert line.fill() == [one]
    line.end_next()
    assert line.fill() == waiting[2:3]  # and then takes turns


def test_an_organization_of_twice_the_weight_gets_twice_the_time(line: Line) -> None:
    single, double = line.organization(1), line.organization(2)
    owners = {line.add(caller, 100).id: caller for caller in (single, double) for _ in range(12)}
    order = line.run_until_empty()

    first = [owners[job_id] for job_id in order[:12]]
    assert (first.count(single), first.count(double)) == (4, 8)


def test_what_is_taken_counts_and_not_what_was_expected(line: Line) -> None:
    one, other = line.organization(), line.organization()
    for caller in (one, other):
        for _ in range(8):
            line.add(caller, 100)
    assert line.fill()
    first = line.running[0][1]
    line.lasts[first], line.running = 450, [(450, first, line.running[0][2])]
    line.end_next()
    owner = line.session.get_one(Job, first).organization_id
    following = [line.session.get_one(Job, job_id).organization_id for job_id in (line.run_until_empty())[:6]]

    assert following == [other_than(owner, one, other)] * 5 + [owner]


def other_than(organization_id: str, *callers: Caller) -> str:
    return next(caller.organization_id for caller in callers if caller.organization_id != organization_id)


def test_a_queue_that_was_empty_begins_anew(line: Line) -> None:
    """What an organization used while nobody else wanted anything is not held against it."""
    heavy, other = line.organization(), line.organization()
    for _ in range(10):
        line.add(heavy, 1000)
    line.run_until_empty()
    jobs = [line.add(caller, 100).id for caller in (heavy, other, heavy, other)]

    assert line.run_until_empty()[:2] == jobs[:2]


def test_a_job_that_goes_back_to_the_queue_is_charged_for_its_time_and_keeps_its_age(line: Line) -> None:
    mine = line.organization()
    jobs = [line.add(mine, 100) for _ in range(2)]
    line.claim()
    _, _, lease = line.running.pop()
    started_at = func.clock_timestamp() - timedelta(seconds=40)
    line.session.execute(update(Job).where(Job.id == lease.job_id).values(claimed_at=started_at))
    leases.stop(line.session, lease)
    line.session.refresh(jobs[0])

    assert jobs[0].worker_seconds == pytest.approx(40, abs=1)
    assert used_until(line) == pytest.approx(40, abs=1)
    assert line.claim() == jobs[0].id


def test_a_job_that_an_earlier_release_has_claimed_can_end(line: Line) -> None:
    job = line.add(line.organization(), 100)
    line.claim()
    line.session.execute(update(Job).where(Job.id == job.id).values(claimed_at=None, charged_seconds=None))
    line.session.refresh(job)
    leases.fail(line.session, line.running[0][2], code="over", message="It is over")

    assert (job.state, job.worker_seconds) == (JobState.FAILED, 0)


@dataclass(frozen=True)
class Arrival:
    at: float
    caller: Caller
    seconds: float


def days_of(line: Line) -> list[Arrival]:
    """One organization floods the queue at once, one of three times the weight later, and four want something now and then."""
    rng = random.Random(11)
    flood, late, *steady = [line.organization(weight) for weight in (1, 3, 1, 1, 2, 0.5)]
    arrivals = [Arrival(0.0, flood, rng.uniform(300, 1800)) for _ in range(110)]
    arrivals += [Arrival(7200.0, late, rng.uniform(60, 600)) for _ in range(60)]
    for caller in steady:
        at = 0.0
        for _ in range(20):
            at += rng.expovariate(1 / 3000)
            arrivals.append(Arrival(at, caller, rng.uniform(60, 2400)))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def bound(line: Line, arrival: Arrival, weights: dict[str, float], longest: dict[str, float]) -> float:
    """What docs/decisions/0013 promises a job that comes now: (R + A + Σ (w · (D + A / v) + c)) / m."""
    mine, session = arrival.caller.organization_id, line.session
    virtual = session.scalar(select(QueueClock.virtual_seconds).where(QueueClock.queue == line.name)) or 0.0
    shares = select(QueueShare.used_until).where(QueueShare.queue == line.name, QueueShare.organization_id == mine)
    debt = max(0.0, (session.scalar(shares) or 0.0) - virtual)
    ahead = select(Job.id).where(Job.queue == line.name, Job.state == JobState.QUEUED, Job.organization_id == mine)
    own = sum(line.lasts[job_id] for job_id in session.scalars(ahead))
    left = sum(ends_at - arrival.at for ends_at, _, _ in line.running)
    others = sum(
        weight * (debt + own / weights[mine]) + longest[organization_id]
        for organization_id, weight in weights.items()
        if organization_id != mine
    )
    return (left + own + others) / line.workers


def waits_by_age(arrivals: list[Arrival], workers: int) -> list[float]:
    """As the queue was before: the oldest first."""
    free, waits = [0.0] * workers, []
    for arrival in arrivals:
        starts_at = max(arrival.at, heapq.heappop(free))
        heapq.heappush(free, starts_at + arrival.seconds)
        waits.append(starts_at - arrival.at)
    return waits


def test_no_job_of_days_of_work_waits_longer_than_promised(session: orm.Session, system_sessions: Sessions) -> None:
    """250 jobs of six organizations on three workers, claimed by the claim itself."""
    line = Line(session, system_sessions, workers=3)
    arrivals = days_of(line)
    weights = {row.id: row.weight for row in session.execute(select(Organization.id, Organization.weight))}
    weights = {arrival.caller.organization_id: weights[arrival.caller.organization_id] for arrival in arrivals}
    longest = defaultdict[str, float](float)
    for arrival in arrivals:
        longest[arrival.caller.organization_id] = max(longest[arrival.caller.organization_id], arrival.seconds)
    promised, jobs = [], []
    for arrival in arrivals:
        while line.running and line.running[0][0] <= arrival.at:
            line.end_next()
            line.fill()
        line.now = arrival.at
        promised.append(bound(line, arrival, weights, longest))
        jobs.append(line.add(arrival.caller, arrival.seconds).id)
        line.fill()
    line.run_until_empty()

    waits = [line.left[job_id] - line.came[job_id] for job_id in jobs]
    assert len(waits) == 250 and all(wait <= most + 1 for wait, most in zip(waits, promised, strict=True))
    by_age = waits_by_age(arrivals, line.workers)
    steady = [n for n, arrival in enumerate(arrivals) if arrival.at not in {0.0, 7200.0}]
    assert statistics.median(waits[n] for n in steady) < statistics.median(by_age[n] for n in steady) / 4
    assert any(wait > most for wait, most in zip(by_age, promised, strict=True))  # else the promise would be worth nothing


def test_backlogged_organizations_stay_within_a_job_of_their_shares(session: orm.Session, system_sessions: Sessions) -> None:
    line, rng = Line(session, system_sessions, workers=2), random.Random(5)
    weights = {line.organization(weight): weight for weight in (1.0, 2.0, 4.0)}
    owners = {line.add(caller, rng.uniform(10, 1000)).id: caller for _ in range(40) for caller in weights}
    given = dict.fromkeys(weights, 0.0)
    line.fill()
    for _ in range(60):  # as long as all of them have jobs waiting
        for caller, weight in weights.items():
            given[caller] = sum(line.lasts[job_id] for job_id in line.left if owners[job_id] == caller) / weight
        assert max(given.values()) - min(given.values()) <= 2 * 1000
        line.end_next()
        line.fill()
    assert min(given.values()) > 2 * 1000


def test_places_are_the_order_of_the_claims(session: orm.Session, system_sessions: Sessions) -> None:
    line, rng = Line(session, system_sessions, workers=2), random.Random(3)
    callers = [line.organization(weight) for weight in (1, 1, 2, 5)]
    for _ in range(6):
        line.add(rng.choice(callers), rng.uniform(10, 900))
    line.fill()
    line.end_next()
    for _ in range(40):
        line.add(rng.choice(callers), rng.uniform(10, 900))
    assert places_of(line, callers) == claims_of(line)


def test_places_are_the_order_of_the_claims_in_a_queue_that_was_empty(line: Line) -> None:
    callers = [line.organization() for _ in range(3)]
    line.add(callers[1], 500)
    line.run_until_empty()
    for caller in (callers[1], *callers, *callers):
        line.add(caller, 100)
    assert places_of(line, callers) == claims_of(line)


def places_of(line: Line, callers: list[Caller]) -> list[str]:
    """By position, put together from what each organization is told."""
    found = dict[int, str]()
    waiting = list(line.session.scalars(select(Job).where(Job.queue == line.name, Job.state == JobState.QUEUED)))
    for caller in callers:
        db.use_organization(line.session, caller.organization_id)
        told = queue.places(line.session, waiting)
        mine = {job.id for job in waiting if job.organization_id == caller.organization_id}
        assert set(told) == mine  # nobody is told of another's jobs
        found |= {place.position: job_id for job_id, place in told.items()}
    assert sorted(found) == list(range(1, len(waiting) + 1))
    return [found[position] for position in sorted(found)]


def claims_of(line: Line) -> list[str]:
    line.workers = 1000
    return line.fill()


def test_when_a_turn_comes_is_told_from_what_was_measured(line: Line) -> None:
    one, other = line.organization(), line.organization()
    line.add(one, 100)
    line.claim()
    started_at = func.clock_timestamp() - timedelta(seconds=10)
    line.session.execute(update(Job).where(Job.queue == line.name).values(claimed_at=started_at))
    line.add(one, 50)
    mine = line.add(other, 30)
    db.use_organization(line.session, other.organization_id)
    now = line.session.scalars(select(func.statement_timestamp())).one()

    place = queue.places(line.session, [mine])[mine.id]
    assert (place.queue, place.position) == (line.name, 1)  # the other has had its turn
    assert place.starts_at is not None and place.ends_at is not None
    assert (place.starts_at - now).total_seconds() == pytest.approx(90, abs=1)
    assert (place.ends_at - place.starts_at).total_seconds() == pytest.approx(30, abs=0.1)
    following = queue.place_of_next(line.session, line.name)
    assert following.position == 2 and following.starts_at is not None
    assert (following.starts_at - now).total_seconds() == pytest.approx(120, abs=1)

    db.use_organization(line.session, one.organization_id)
    assert queue.place_of_next(line.session, line.name).position == 3


def test_where_nothing_was_measured_no_time_is_told(line: Line) -> None:
    mine = line.organization()
    line.add(mine, 100, base="another")
    first, second = line.add(mine, 50), line.add(mine, 50, base="another")
    db.use_organization(line.session, mine.organization_id)
    told = queue.places(line.session, [first, second])

    assert [(told[job.id].position, told[job.id].starts_at) for job in (first, second)] == [(2, None), (3, None)]
    line.claim()  # what runs is of unknown length too
    assert queue.places(line.session, [first])[first.id].starts_at is None
    line.session.execute(delete(Throughput).where(Throughput.queue == line.name))
    assert throughput.expected_seconds(line.session, first) is None


def test_the_last_few_finished_jobs_tell_how_fast_it_goes(line: Line) -> None:
    mine = line.organization()
    for speed in range(1, 31):
        job = line.add(mine, 1, trained_tokens=1000 * speed, worker_seconds=1000.0)
        throughput.record(line.session, job)
    line.session.flush()

    kept = line.session.scalars(select(Throughput.tokens).where(Throughput.queue == line.name)).all()
    assert sorted(kept) == [1000 * speed for speed in range(11, 31)]
    assert throughput.tokens_per_second(line.session, queue=line.name, base=make.TINY) == 20.5
    assert throughput.tokens_per_second(line.session, queue=line.name, base="another") is None
    asked = line.add(mine, 41)  # 4,100 tokens
    assert throughput.expected_seconds(line.session, asked) == 200


def test_a_job_that_rates_answers_says_how_fast_a_supervised_one_is(line: Line) -> None:
    """Six forwards for each token, where that takes three."""
    line.session.execute(delete(Throughput).where(Throughput.queue == line.name))
    job = line.add(line.organization(), 1, trained_tokens=1000, worker_seconds=100.0)
    job.spec = {"preference": {"method": "kto"}}
    throughput.record(line.session, job)

    assert throughput.tokens_per_second(line.session, queue=line.name, base=make.TINY) == 20


def test_small_jobs_which_mostly_start_say_little_of_a_large_one(line: Line) -> None:
    mine = line.organization()
    for tokens, seconds in ((1_000_000, 1000.0), *((10, 20.0) for _ in range(5))):
        throughput.record(line.session, line.add(mine, 1, trained_tokens=tokens, worker_seconds=seconds))
    line.session.flush()

    speed = throughput.tokens_per_second(line.session, queue=line.name, base=make.TINY)
    assert speed == pytest.approx((1_000_050 + 100 * SPEED) / 1200)  # the line has a measurement of its own


def test_a_finished_job_is_remembered_by_its_speed(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    session.execute(update(Job).where(Job.id == job.id).values(claimed_at=func.clock_timestamp() - timedelta(seconds=20)))
    make.complete(session, lease)

    assert job.total_tokens == 600 * 10  # of all epochs
    speed = throughput.tokens_per_second(session, queue=job.queue, base=make.TINY)
    assert job.worker_seconds == pytest.approx(20, abs=1) and speed == pytest.approx(100 / 20, rel=0.05)


def test_a_job_of_unknown_length_is_charged_something(line: Line) -> None:
    mine = line.organization(2)
    line.add(mine, 100, base="another")
    line.claim()

    assert used_until(line) == turns.UNKNOWN_SECONDS / 2


def used_until(line: Line) -> float:
    """Of the one organization that has had something of this queue."""
    return line.session.scalars(select(QueueShare.used_until).where(QueueShare.queue == line.name)).one()


def test_claims_at_the_same_moment_take_turns(system_sessions: Sessions) -> None:
    with system_sessions.begin() as session:
        line = Line(session, system_sessions)
        callers = [line.organization(), line.organization()]
        owners = {line.add(caller, 100).id: caller for caller in callers for _ in range(8)}

    def claim(number: int) -> str:
        with system_sessions.begin() as own:
            lease = leases.claim(own, line.name, owner=str(number), settings=make.LEASES)
            assert lease is not None
            return lease.job_id

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(claim, range(8)))
    assert len(set(taken)) == 8
    assert [owners[job_id] for job_id in taken].count(callers[0]) == 4
