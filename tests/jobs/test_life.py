"""Whatever happens to a job, in whatever order, its life keeps its promises: as a value, as rows, and when two speak at once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import delete, func, orm, select

from app.core.settings import LeaseSettings
from app.jobs import life, states
from app.jobs.life import MOVES, TERMINAL, IllegalMove, Life
from app.models import Adapter, Desired, File, Job, JobEvent, JobState, WebhookDelivery, WebhookEndpoint
from app.webhooks.emit import EventType
from tests import make
from tests.conftest import make_organization
from tests.jobs.lives import DRAWN, KINDS, SETTINGS, Act, Done, Drawn, InPostgres, World, act_of, is_due

HELD_SECONDS, HOOKS = 0.05, "https://hooks.example"
TOLD = {
    JobState.VALIDATING_FILES: EventType.CREATED,
    JobState.RUNNING: EventType.STARTED,
    JobState.PAUSED: EventType.PAUSED,
    JobState.SUCCEEDED: EventType.SUCCEEDED,
    JobState.FAILED: EventType.FAILED,
    JobState.CANCELLED: EventType.CANCELLED,
}


@pytest.fixture(scope="module", autouse=True)
def no_endpoint_stays(system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[None]:
    """The relay knows no tenants: whichever test delivers next would send what is left."""
    yield
    with system_sessions.begin() as session:
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.url == HOOKS))


def queued() -> World:
    return World(Life("ftjob-1", JobState.QUEUED), history=(JobState.VALIDATING_FILES, JobState.QUEUED))


class Lives(RuleBasedStateMachine):
    """A job as a value."""

    def __init__(self) -> None:
        super().__init__()
        self.world = queued()
        self.was_cancelled = False
        self.highest_step = 0

    def act(self, act: Act) -> Done:
        return act.expected(self.world)

    @rule(drawn=DRAWN)
    def something_happens(self, drawn: Drawn) -> None:
        act = act_of(drawn, self.world)
        before, done = self.world, self.act(act)
        self.world = done.world
        self.was_cancelled |= act.kind == "cancel" and done.answer == "ok"
        assert self.world.life.step >= before.life.step
        if before.life.state in TERMINAL:
            assert self.world.life == before.life

    @invariant()
    def every_move_is_legal(self) -> None:
        assert all(to in MOVES[state] for state, to in pairwise(self.world.history))

    @invariant()
    def every_claim_is_an_attempt_of_its_own(self) -> None:
        assert self.world.life.attempt == self.world.history.count(JobState.RUNNING)

    @invariant()
    def a_cancelled_job_never_succeeds(self) -> None:
        if self.was_cancelled:
            assert self.world.life.state not in (JobState.SUCCEEDED, JobState.EVALUATING)
            assert self.world.life.state in TERMINAL or self.world.life.desired == Desired.CANCEL

    @invariant()
    def nothing_breaks_for_ever(self) -> None:
        now = self.world.life
        if now.state not in TERMINAL:
            assert now.failures < SETTINGS.max_attempts and now.deaths < SETTINGS.max_deaths_at_step


class LivesInPostgres(Lives):
    """The same as rows, each act in a transaction of its own."""

    sessions: orm.sessionmaker[orm.Session]

    @initialize()
    def a_job_waits(self) -> None:
        self.there, self.world = begin(self.sessions)

    def act(self, act: Act) -> Done:
        expected = super().act(act)
        assert act.done(self.there) == expected.answer, act
        return expected

    @invariant()
    def the_rows_say_the_same(self) -> None:
        if hasattr(self, "there"):
            require_same(self.there, self.world)


def begin(sessions: orm.sessionmaker[orm.Session]) -> tuple[InPostgres, World]:
    """A job that waits for a worker, in a project that is told of everything."""
    caller = make_organization(sessions)
    with sessions.begin() as session:
        endpoint = {"id": f"we_{caller.organization_id}", "name": "", "url": HOOKS, "secret": "whsec_"}
        owned = {"organization_id": caller.organization_id, "project_id": caller.project_id}
        session.add(WebhookEndpoint(**endpoint, **owned, event_types=list(EventType), is_enabled=True))
        session.flush()
        job = make.queued_job(session, caller)
        there = InPostgres(sessions, caller, job.id, job.queue)
    return there, replace(queued(), life=replace(queued().life, id=job.id))


def require_same(there: InPostgres, world: World) -> None:
    with there.sessions.begin() as session:
        job = session.scalars(select(Job).where(Job.id == there.job_id)).one()
        assert states.life_of(job) == world.life
        assert (job.lease_owner is not None) == (job.state == JobState.RUNNING)
        assert (job.finished_at is not None) == (job.state in TERMINAL)
        assert job.state != JobState.QUEUED or is_due(session, job) == world.is_due
        require_told(session, job, world)
        require_published_once(session, job)


def require_told(session: orm.Session, job: Job, world: World) -> None:
    """Events without a gap, and for each state that was entered one message to the endpoint."""
    of_job = select(JobEvent.sequence).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)
    assert list(session.scalars(of_job)) == list(range(1, job.event_count + 1))
    mine = WebhookDelivery.organization_id == job.organization_id, WebhookDelivery.event_type != EventType.CHECKPOINT
    by_type = select(WebhookDelivery.event_type, func.count()).where(*mine).group_by(WebhookDelivery.event_type)
    assert dict(session.execute(by_type).all()) == Counter(str(TOLD[state]) for state in world.history if state in TOLD)


def require_published_once(session: orm.Session, job: Job) -> None:
    final = select(func.count()).select_from(Adapter).where(Adapter.job_id == job.id, Adapter.step.is_(None))
    results = select(func.count()).select_from(File).where(File.filename == f"{job.id}-metrics.csv")
    has_succeeded = job.state == JobState.SUCCEEDED
    assert (session.scalar(final), session.scalar(results)) == (has_succeeded, has_succeeded)
    assert (job.fine_tuned_model is not None) == has_succeeded


def test_a_job_as_a_value_keeps_its_promises() -> None:
    run_state_machine_as_test(Lives, settings=settings(max_examples=100, stateful_step_count=50))


def test_a_job_as_rows_lives_the_same_life(system_sessions: orm.sessionmaker[orm.Session]) -> None:
    machine = type("Here", (LivesInPostgres,), {"sessions": system_sessions})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=40))


def at_once(acts: Sequence[Act], there: InPostgres, *, is_held: bool) -> list[object]:
    """Each in a thread and with a connection of its own, begun at the same moment.

    `is_held`: somebody else holds the row until all have begun, so that whoever reads before it locks has read too early.
    """
    with ThreadPoolExecutor(len(acts)) as threads, there.sessions.begin() as session:
        if is_held:
            session.scalars(select(Job.id).where(Job.id == there.job_id).with_for_update()).one()
        running = [threads.submit(act.done, there) for act in acts]
        wait(running, timeout=HELD_SECONDS if is_held else 0)
        session.commit()
        return [one.result() for one in running]


def in_some_order(acts: Sequence[Act], world: World) -> list[tuple[World, list[object]]]:
    """Every end that they may come to one after another; a claim and the reaper pass over a row that is locked."""
    ends = []
    skippable = [index for index, act in enumerate(acts) if act.may_be_skipped]
    skips = [some for count in range(len(skippable) + 1) for some in combinations(skippable, count)]
    for order in permutations(range(len(acts))):
        for skipped in skips:
            now, answers = world, [None if act.kind == "claim" else "ok" for act in acts]
            for index in order:
                if index not in skipped:
                    now, answers[index] = (done := acts[index].expected(now)).world, done.answer
            ends.append((now, answers))
    return ends


@given(before=st.lists(DRAWN, max_size=8), drawn=st.lists(DRAWN, min_size=2, max_size=3), is_held=st.booleans())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_acts_at_the_same_moment_end_as_if_one_had_come_first(
    system_sessions: orm.sessionmaker[orm.Session], before: list[Drawn], drawn: list[Drawn], is_held: bool
) -> None:
    there, world = begin(system_sessions)
    for one in before:
        act = act_of(one, world)
        act.done(there)
        world = act.expected(world).world
    together = [act_of(one, world) for one in drawn]

    require_serial(together, there, world, is_held=is_held)


@pytest.mark.parametrize("first", KINDS)
def test_whoever_waits_for_the_row_of_a_running_job_finds_what_came_before(
    system_sessions: orm.sessionmaker[orm.Session], first: str
) -> None:
    """Every pair of acts, both begun while somebody else holds the row."""
    for second in KINDS:
        there, world = begin(system_sessions)
        for act in (Act("claim"), Act("silence")):
            act.done(there)
            world = act.expected(world).world
        require_serial([Act(first, attempt=1, step=1), Act(second, attempt=1, step=1)], there, world, is_held=True)


def require_serial(together: Sequence[Act], there: InPostgres, world: World, *, is_held: bool) -> None:
    """Done at once, they end as they would one after another."""
    answers = at_once(together, there, is_held=is_held)
    possible = [end for end, told in in_some_order(together, world) if told == answers]
    assert possible, (together, answers)
    with there.sessions.begin() as session:
        job = session.scalars(select(Job).where(Job.id == there.job_id)).one()
        now = states.life_of(job), job.state != JobState.QUEUED or is_due(session, job)
    fitting = [end for end in possible if now == (end.life, end.life.state != JobState.QUEUED or end.is_due)]
    assert fitting, (together, answers, now, possible)
    require_same(there, fitting[0])


SHORT = LeaseSettings(max_attempts=5, max_deaths_at_step=3)
RUNNING = Life("ftjob-1", JobState.RUNNING, attempt=1)


def broken_at(now: Life, *steps: int | None, is_death: bool = True) -> life.Broken:
    """Attempts one after another that break at these steps."""
    for step in steps:
        began = now if step is None else life.stepped(now, step)
        broken = life.broken(began, is_death=is_death, settings=SHORT)
        if broken.after.state == JobState.FAILED:
            break
        now = life.claimed(broken.after)
    return broken


def test_three_deaths_at_the_same_step_are_poison() -> None:
    broken = broken_at(RUNNING, 7, 7, 7)

    assert (broken.after.state, broken.error_code) == (JobState.FAILED, life.POISON)


@pytest.mark.parametrize(
    ("steps", "is_death"), [((7, 7, 8, 7), True), ((7, 7, None, None), True), ((7, 7, 7, 7), False)], ids=str
)
def test_what_breaks_elsewhere_or_for_another_reason_is_no_poison(steps: tuple[int | None, ...], is_death: bool) -> None:
    assert broken_at(RUNNING, *steps, is_death=is_death).after.state == JobState.QUEUED


def test_a_job_that_gets_on_is_not_given_up_however_often_it_breaks() -> None:
    now = RUNNING
    for step in range(1, 50):
        now = life.claimed(life.broken(life.checkpointed(life.stepped(now, step)), is_death=True, settings=SHORT).after)

    assert now.failures == 1


def test_each_broken_attempt_waits_longer_than_the_last_up_to_ten_minutes() -> None:
    patient = LeaseSettings(max_attempts=2000)
    now, waits = RUNNING, []
    for _ in range(1500):
        broken = life.broken(now, is_death=False, settings=patient)
        waits.append(broken.wait_seconds)
        now = life.claimed(broken.after)

    assert waits[:4] == [5, 10, 20, 40] and waits == sorted(waits) and waits[-1] == life.MAX_BACKOFF_SECONDS


def test_states_that_end_a_job_absorb() -> None:
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == TERMINAL
    assert set(MOVES) == set(JobState)
    for state in TERMINAL:
        for to in JobState:
            with pytest.raises(IllegalMove):
                life.moved(Life("ftjob-1", state), to)
