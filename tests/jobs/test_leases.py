from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.adapters import service as adapters
from app.core import catalog, events
from app.core.errors import Conflict
from app.jobs import leases
from app.jobs import service as jobs
from app.jobs.leases import Lease, LeaseLost
from app.jobs.life import IllegalMove
from app.models import Adapter, Desired, Job, JobCheckpoint, JobEvent, JobState, OutboxMessage
from tests import make

STEPPED = events.Stepped(
    step=3,
    total_steps=9,
    train_loss=1.5,
    train_mean_token_accuracy=0.5,
    learning_rate=1e-3,
    grad_norm=1.0,
    tokens=10,
    labelled_tokens=5,
    tokens_left=0,
    tokens_per_second=100.0,
)


@pytest.fixture
def session(system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[orm.Session]:
    """A transaction that is rolled back: tests see their own rows only."""
    with system_sessions() as opened:
        yield opened
        opened.rollback()


def sequences(session: orm.Session, job: Job) -> list[int]:
    return list(session.scalars(select(JobEvent.sequence).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)))


def test_a_job_is_claimed_once(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)

    assert make.claim(session, job).attempt == 1
    assert leases.claim(session, job.queue, owner="other", settings=make.LEASES) is None
    assert make.reread(session, job).state == JobState.RUNNING


def test_a_dead_worker_gives_its_job_back(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    first = make.claim(session, job, owner="a")
    make.expire_lease(session, job)
    leases.reap(session, settings=make.LEASES)
    make.make_due(session, job)
    second = make.claim(session, job, owner="b")

    assert second.attempt == first.attempt + 1
    with pytest.raises(LeaseLost):
        make.complete(session, first)
    make.complete(session, second)
    assert make.reread(session, job).state == JobState.SUCCEEDED


def test_a_worker_that_fails_too_often_ends_the_job(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    for _ in range(make.LEASES.max_attempts):
        make.make_due(session, job)
        leases.release(session, make.claim(session, job), reason="the disk is full", settings=make.LEASES)

    assert job.state == JobState.FAILED
    assert job.error is not None and job.error["code"] == "infra_exhausted"


def test_a_failed_attempt_waits_before_the_next(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    leases.release(session, make.claim(session, job), reason="the network broke", settings=make.LEASES)

    assert make.reread(session, job).state == JobState.QUEUED
    assert leases.claim(session, job.queue, owner="b", settings=make.LEASES) is None


def test_a_drained_job_is_not_counted_against(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    leases.stop(session, make.claim(session, job))

    assert (job.failures, job.state) == (0, JobState.QUEUED)
    assert make.claim(session, job).attempt == 2


def test_success_publishes_one_model_and_asks_for_its_prefetch(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    make.complete(session, make.claim(session, job))
    adapter = session.scalars(select(Adapter).where(Adapter.job_id == job.id)).one()
    asked = session.scalars(select(OutboxMessage).where(OutboxMessage.topic == "prefetch")).all()

    assert adapter.name == job.fine_tuned_model == f"ft:{make.TINY}:{organization.organization_slug}::{job.id[-8:]}"
    assert job.lease_owner is None
    assert job.result_file_id is not None
    assert job.plan is not None and (job.plan["measured_peak_bytes"], job.plan["measured"]["measured_as"]) == (1, "rss")
    assert job.plan["predicted_peak_bytes"] > 1
    assert adapter.id in [message.payload["id"] for message in asked]


def test_a_cancelled_job_never_succeeds(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    jobs.cancel(session, organization, job.id)

    assert job.state == JobState.RUNNING  # its worker has yet to hear of it
    assert leases.heartbeat(session, lease, [], settings=make.LEASES) == Desired.CANCEL
    make.complete(session, lease)
    assert job.state == JobState.CANCELLED
    assert session.scalar(select(Adapter.id).where(Adapter.job_id == job.id)) is None


def test_cancelling_twice_is_the_same_as_once(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    jobs.cancel(session, organization, job.id)
    events_before = sequences(session, job)

    assert jobs.cancel(session, organization, job.id).state == JobState.CANCELLED
    assert sequences(session, job) == events_before


def test_a_finished_job_cannot_be_cancelled(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    make.complete(session, make.claim(session, job))

    with pytest.raises(IllegalMove, match="succeeded"):
        jobs.cancel(session, organization, job.id)


def test_a_waiting_job_is_paused_at_once_and_nobody_takes_it(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    assert jobs.pause(session, organization, job.id).state == jobs.pause(session, organization, job.id).state == JobState.PAUSED

    assert leases.claim(session, job.queue, owner="x", settings=make.LEASES) is None
    jobs.resume(session, organization, job.id)
    assert make.claim(session, job).attempt == 1


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_running_job_is_paused_when_its_worker_stops_or_dies(
    session: orm.Session, organization: Caller, is_broken: bool
) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    jobs.pause(session, organization, job.id)

    assert job.state == JobState.RUNNING
    assert leases.heartbeat(session, lease, [], settings=make.LEASES) == Desired.PAUSE
    if is_broken:
        leases.release(session, lease, reason="It died", settings=make.LEASES)
    else:
        leases.stop(session, lease)
    assert (job.state, job.failures) == (JobState.PAUSED, 0)


def test_a_job_resumed_before_its_worker_heard_of_the_pause_goes_on(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    jobs.pause(session, organization, job.id)
    jobs.resume(session, organization, job.id)

    assert leases.heartbeat(session, lease, [], settings=make.LEASES) == Desired.RUN
    assert job.state == JobState.RUNNING


def test_a_job_that_is_over_or_being_cancelled_can_be_neither_paused_nor_resumed(
    session: orm.Session, organization: Caller
) -> None:
    over, ending = make.queued_job(session, organization), make.queued_job(session, organization)
    make.complete(session, make.claim(session, over))
    make.claim(session, ending)
    jobs.cancel(session, organization, ending.id)

    for job, word in ((over, "succeeded"), (ending, "being cancelled")):
        for ask in (jobs.pause, jobs.resume):
            with pytest.raises(IllegalMove, match=word):
                ask(session, organization, job.id)


def test_events_come_without_a_gap_and_steps_never_fall(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    earlier = STEPPED.model_copy(update={"step": 2})
    leases.heartbeat(session, lease, [STEPPED, earlier], settings=make.LEASES, seconds_left=30)
    session.flush()

    assert sequences(session, job) == list(range(1, job.event_count + 1))
    assert job.step == 3


def test_a_checkpoint_is_known_once_and_answers_by_name(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    for _ in range(2):
        leases.checkpoint(session, lease, step=4, prefix="p", manifest=make.manifest(), metrics={"train_loss": 1.0})
        session.flush()

    assert [found.step for found in leases.resumable_checkpoints(session, lease)] == [4]
    names = session.scalars(select(Adapter.name).where(Adapter.job_id == job.id)).all()
    assert names == [f"ft:{make.TINY}:{organization.organization_slug}::{job.id[-8:]}:ckpt-step-4"]


def checkpointed(session: orm.Session, lease: Lease, *losses: float) -> None:
    """One at every second step, with these validation losses."""
    for number, loss in enumerate(losses, 1):
        make.checkpoint(session, lease, step=2 * number, metrics={"valid_loss": loss})


def states_of(session: orm.Session, job: Job) -> list[int]:
    mine = select(JobCheckpoint.step).where(JobCheckpoint.job_id == job.id, JobCheckpoint.has_state)
    return sorted(session.scalars(mine))


def purged(session: orm.Session, job: Job) -> list[str]:
    """What is deleted once this transaction has committed."""
    messages = session.scalars(select(OutboxMessage).where(OutboxMessage.topic == "purge"))
    prefixes = sorted(message.payload["prefix"] for message in messages)
    return [prefix.partition(f"{job.id}/")[2] for prefix in prefixes if job.id in prefix]


def test_a_resume_finds_the_last_two_checkpoints_and_the_best_and_no_other_state_is_kept(
    session: orm.Session, organization: Caller
) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    checkpointed(session, lease, 3.0, 1.0, 2.0, 2.1, 2.2)

    assert [found.step for found in leases.resumable_checkpoints(session, lease)] == [10, 8, 4]
    assert purged(session, job) == ["a1/step-2/state/", "a1/step-6/state/"]
    assert len(jobs.list_checkpoints(session, organization, job.id, after=None, limit=9)[0]) == 5
    assert len(session.scalars(select(Adapter).where(Adapter.job_id == job.id)).all()) == 5  # every one still answers


def test_an_attempt_that_comes_by_a_step_again_replaces_its_checkpoint(session: orm.Session, organization: Caller) -> None:
    """It was found damaged in storage, or it would have been gone on from."""
    job = make.queued_job(session, organization)
    checkpointed(session, first := make.claim(session, job), 3.0, 2.0, 1.0)
    leases.release(session, first, reason="it died", settings=make.LEASES)
    make.make_due(session, job)
    second = make.claim(session, job)
    make.checkpoint(session, second, step=5)

    assert states_of(session, job) == [4, 5]  # that of step 6 lies ahead and was not gone on from
    make.checkpoint(session, second, step=6)
    make.checkpoint(session, second, step=6)  # its commit was in doubt
    (replaced,) = session.scalars(select(Adapter).where(Adapter.job_id == job.id, Adapter.step == 6))
    assert replaced.prefix == f"somewhere/{job.id}/a2/step-6/adapter"
    assert purged(session, job) == ["a1/step-2/state/", "a1/step-6/", "a1/step-6/state/"]
    assert states_of(session, job) == [4, 5, 6]


@pytest.mark.parametrize(
    "end", [make.complete, lambda session, lease: leases.fail(session, lease, code="diverged", message="no")]
)
def test_the_end_of_a_job_drops_every_state_and_keeps_every_model(
    session: orm.Session, organization: Caller, end: Callable[[orm.Session, Lease], None]
) -> None:
    job = make.queued_job(session, organization)
    checkpointed(session, lease := make.claim(session, job), 2.0, 1.0)
    end(session, lease)

    assert states_of(session, job) == []
    assert purged(session, job) == ["a1/step-2/state/", "a1/step-4/state/"]
    assert len(jobs.list_checkpoints(session, organization, job.id, after=None, limit=9)[0]) == 2


def test_a_waiting_job_that_is_cancelled_drops_its_states(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    checkpointed(session, lease := make.claim(session, job), 2.0)
    leases.stop(session, lease)
    jobs.cancel(session, organization, job.id)

    assert (states_of(session, job), purged(session, job)) == ([], ["a1/step-2/state/"])


def test_a_cancelled_job_whose_attempt_breaks_is_cancelled(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    jobs.cancel(session, organization, job.id)
    leases.release(session, lease, reason="the trainer died", settings=make.LEASES)

    assert job.state == JobState.CANCELLED


def test_a_checkpoint_that_a_running_job_needs_cannot_be_deleted(session: orm.Session, organization: Caller) -> None:
    job = make.queued_job(session, organization)
    lease = make.claim(session, job)
    make.checkpoint(session, lease, step=4)
    name = session.scalars(select(Adapter.name).where(Adapter.job_id == job.id)).one()

    with pytest.raises(Conflict, match="needs ft:"):
        adapters.delete(session, organization, catalog.load(), name)
    leases.fail(session, lease, code="diverged", message="no")
    adapters.delete(session, organization, catalog.load(), name)
    assert "a1/step-4/" in purged(session, job)
    assert jobs.list_checkpoints(session, organization, job.id, after=None, limit=9)[0] == []
