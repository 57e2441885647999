"""What a worker hears and tells while an attempt lasts."""

import random

import psycopg
import pytest
from sqlalchemy import event, orm, select
from sqlalchemy.exc import OperationalError

from app import db
from app.accounts.caller import Caller
from app.core.events import Evaluated, Started, Stepped
from app.core.settings import LeaseSettings
from app.jobs import leases
from app.jobs import service as jobs
from app.jobs.leases import LeaseLost
from app.models import Desired, JobEvent
from tests import make
from tests.embedded.patience import eventually
from worker import heart
from worker.heart import EVALUATED, Heart, Pace

RARE = LeaseSettings(lease_seconds=3000, heartbeat_seconds=1000)


def test_what_the_owner_wants_is_heard_between_beats(
    system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> None:
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        lease = make.claim(session, job)
    with Heart(system_sessions, lease, RARE) as beating:
        for ask, wants in ((jobs.pause, Desired.PAUSE), (jobs.resume, Desired.RUN), (jobs.cancel, Desired.CANCEL)):
            with system_sessions.begin() as session:
                ask(session, organization, job.id)
            eventually(lambda wants=wants: beating.wants == wants)


def test_a_lost_lease_is_heard_between_beats(system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> None:
    with system_sessions.begin() as session:
        lease = make.claim(session, make.queued_job(session, organization))
    with Heart(system_sessions, lease, RARE) as beating:
        with system_sessions.begin() as session:
            leases.fail(session, lease, code="diverged", message="no")
        eventually(lambda: beating._failure)
        with pytest.raises(LeaseLost):
            beating.check()


def test_a_commit_whose_answer_is_lost_is_not_said_again(
    system_sessions: orm.sessionmaker[orm.Session], organization: Caller
) -> None:
    """The server dies, or the network does, between its commit and our hearing of it."""
    with system_sessions.begin() as session:
        lease = make.claim(session, make.queued_job(session, organization))
    fragile = orm.sessionmaker(system_sessions.kw["bind"], expire_on_commit=False)
    lost = [OperationalError("COMMIT", {}, psycopg.OperationalError("server closed the connection unexpectedly"))]

    @event.listens_for(fragile, "after_commit")
    def lose_the_answer(_: orm.Session) -> None:
        if lost:
            raise lost.pop()

    beating = Heart(fragile, lease, RARE)
    beating.say(stepped(1, tokens=1, left=10 - 1))
    beating.say(stepped(2, tokens=1, left=10 - 2))
    with pytest.raises(OperationalError) as heard:
        beating.flush()
    assert db.is_outage(heard.value)
    beating.say(stepped(3, tokens=1, left=10 - 3))
    beating.flush()
    beating.say(stepped(4, tokens=1, left=10 - 4))
    beating.flush()

    with system_sessions() as session:
        told = session.scalars(select(JobEvent).where(JobEvent.job_id == lease.job_id).order_by(JobEvent.sequence)).all()
    assert [one.data["step"] for one in told if one.type == "metrics" and one.data] == [1, 2, 3, 4]
    assert [one.sequence for one in told] == list(range(1, len(told) + 1))


def test_the_time_left_is_within_a_fifth_after_a_tenth_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of very different lengths, a checkpoint every twenty: what counts is tokens."""
    clock, rng, pace = [0.0], random.Random(4), Pace()
    monkeypatch.setattr(heart.time, "monotonic", lambda: clock[0])
    pace.note(started(200, every=20))
    sizes = [rng.randint(200, 4000) for _ in range(200)]
    seconds = [size / 1000 * rng.uniform(0.9, 1.1) + (3 if number % 20 == 19 else 0) for number, size in enumerate(sizes)]
    clock[0] += 9  # getting ready is no pace

    for number, (size, took) in enumerate(zip(sizes, seconds, strict=True)):
        clock[0] += took
        pace.note(stepped(number + 1, tokens=size, left=sum(sizes[number + 1 :]), total_steps=200))
        if 20 <= number < 190:
            assert pace.seconds_left == pytest.approx(sum(seconds[number + 1 :]), rel=0.2)


def test_nothing_is_told_before_there_is_a_pace() -> None:
    pace = Pace()
    pace.note(started(10))
    pace.note(stepped(1, tokens=10, left=90))

    assert pace.seconds_left is None


def test_evaluations_to_come_are_counted_before_one_has_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of a second; after the 4th, the 8th and the last an evaluation of four seconds, which looks like one of three."""
    clock, pace = [0.0], Pace()
    monkeypatch.setattr(heart.time, "monotonic", lambda: clock[0])
    pace.note(started(10, every=4, evaluation_tokens=round(300 / EVALUATED)))
    left = []
    for step in range(1, 11):
        clock[0] += 1
        pace.note(stepped(step, tokens=100, left=100 * (10 - step)))
        left.append(pace.seconds_left)
        if step in (4, 8):
            clock[0] += 4
            pace.note(Evaluated(step=step, valid_loss=1.0, valid_mean_token_accuracy=0.5))
            assert pace.seconds_left == pytest.approx(10 - step + 4 * (1 + (step < 8)))

    assert left[1:] == pytest.approx([8 + 9, 7 + 9, 6 + 9, 5 + 8, 4 + 8, 3 + 8, 2 + 8, 1 + 4, 4])


def test_the_look_at_its_examples_is_part_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of a second; at the end an evaluation that looks like three seconds, and an examination of twice its tokens."""
    clock, pace = [0.0], Pace()
    monkeypatch.setattr(heart.time, "monotonic", lambda: clock[0])
    tokens = round(300 / EVALUATED)
    pace.note(started(10, every=20, evaluation_tokens=tokens, examination_tokens=2 * tokens))
    for step in (1, 2):
        clock[0] += 1
        pace.note(stepped(step, tokens=100, left=100 * (10 - step)))

    assert pace.seconds_left == pytest.approx(8 + 3 + 6)


def test_the_time_between_two_trainers_is_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = [0.0], Pace()
    monkeypatch.setattr(heart.time, "monotonic", lambda: clock[0])
    for began_after, steps in ((0, (1, 2, 3)), (600, (3, 4))):  # the first ran out of memory
        clock[0] += began_after
        pace.note(started(10))
        for step in steps:
            clock[0] += 1
            pace.note(stepped(step, tokens=100, left=100 * (10 - step)))

    assert pace.seconds_left == pytest.approx(6)


def started(steps: int, *, every: int = 1000, evaluation_tokens: int = 0, examination_tokens: int = 0) -> Started:
    return Started(
        total_steps=steps,
        resumed_from=0,
        trainable_parameters=1,
        checkpoint_every_steps=every,
        evaluation_tokens=evaluation_tokens,
        examination_tokens=examination_tokens,
    )


def stepped(step: int, *, tokens: int, left: int, total_steps: int = 10) -> Stepped:
    return Stepped(
        step=step,
        total_steps=total_steps,
        train_loss=1.0,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=tokens,
        labelled_tokens=tokens,
        tokens_left=left,
        tokens_per_second=1.0,
    )
