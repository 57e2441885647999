"""A worker's attempts at jobs, with real trainers, rows and storage: what they leave, and what a later one finds."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sqlalchemy import orm, select

from app.accounts.caller import Caller
from app.core import catalog
from app.core.settings import Settings
from app.core.spec import TrainSpec
from app.core.storage import Storage
from app.core.tokens.tokenise import tokenise
from app.jobs import preparing
from app.jobs import service as jobs
from app.jobs.preparing import Dataset, Datasets
from app.models import Adapter, Job, JobCheckpoint, JobEvent, JobState
from tests import make, small_disk
from tests.embedded.patience import eventually
from tests.stack import command_of
from tests.training import make as training
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.services import Services
from worker.supervisor import Supervisor


@pytest.fixture(scope="module")
def tiny(bases_dir: Path) -> LoadedBase:
    return bases.load(catalog.load()[make.TINY], bases_dir, device="cpu", for_training=True)


@pytest.fixture
def to(
    settings: Settings,
    system_sessions: orm.sessionmaker[orm.Session],
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Services:
    """As a train worker has them. Its trainers load their base when they have a job."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    cold = settings.training.model_copy(update={"warm_base": ""})
    mine = settings.model_copy(update={"training": cold, "work_dir": tmp_path / "work"})
    return Services(mine, system_sessions, storage, catalog.load())


@contextmanager
def at_work(to: Services, queue: str) -> Iterator[Supervisor]:
    """A worker that runs the jobs of this queue; at the end of the block it has run them all, or has been drained."""
    supervisor = Supervisor(to, owner="worker")
    thread = threading.Thread(target=supervisor.run_all, args=(queue,))
    thread.start()
    try:
        yield supervisor
    except BaseException:
        supervisor.drain()
        raise
    finally:
        thread.join()
        supervisor.close()


def queued(
    to: Services, organization: Caller, tiny: LoadedBase, folder: Path, asked: TrainSpec, *, has_validation: bool = False
) -> Job:
    """A job with this spec, prepared, in a queue of its own. Its validation asks for answers other than those trained on."""
    folder.mkdir(exist_ok=True)
    training.examples(tiny.renderer).write(folder / "tokens.safetensors")
    answers = [training.chat(line, "Count to 3.", answer) for line, answer in enumerate(("abc", "xyz"), 1)]
    tokenise(answers, tiny.renderer, max_seq_length=64).write(folder / "validation.safetensors")
    with to.sessions.begin() as session:
        job = make.job(session, organization)

        def stored(name: str) -> Dataset:
            key = f"orgs/{organization.organization_id}/datasets/{job.id}-{name}"
            return Dataset(key=key, sha256=to.storage.put_file(key, folder / name).sha256)

        validation = stored("validation.safetensors") if has_validation else None
        admitted = make.admitted().model_copy(update={"spec": asked})
        datasets = Datasets(training=stored("tokens.safetensors"), validation=validation)
        preparing.finish(session, job.id, admitted=admitted, datasets=datasets)
        job.queue = f"train.{job.id}"
    return job


def told(to: Services, job: Job) -> list[JobEvent]:
    with to.sessions() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.sequence)))


def messages(to: Services, job: Job) -> list[str]:
    return [event.message for event in told(to, job) if event.type == "message"]


def losses(to: Services, job: Job) -> list[tuple[int, float]]:
    return [(event.data["step"], event.data["train_loss"]) for event in told(to, job) if event.type == "metrics" and event.data]


def checkpoints(to: Services, job: Job) -> list[JobCheckpoint]:
    """Those with a training state, the newest first."""
    with to.sessions() as session:
        found = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.has_state)
        return list(session.scalars(found.order_by(JobCheckpoint.step.desc())))


def steps_kept(to: Services, job: Job) -> list[int]:
    """The steps of all its checkpoints, in their order."""
    with to.sessions() as session:
        return list(
            session.scalars(select(JobCheckpoint.step).where(JobCheckpoint.job_id == job.id).order_by(JobCheckpoint.step))
        )


def state_of(to: Services, job: Job) -> str:
    with to.sessions() as session:
        return session.scalars(select(Job.state).where(Job.id == job.id)).one()


def test_a_damaged_checkpoint_in_storage_falls_back_to_the_one_before(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    asked = training.spec(n_epochs=30, checkpoint_every_steps=10)
    job = queued(to, organization, tiny, tmp_path, asked)
    with at_work(to, job.queue) as first:
        eventually(lambda: len(checkpoints(to, job)) == 2)
        first.drain()
    newest, before = checkpoints(to, job)
    before_that = losses(to, job)
    to.storage.put(f"{newest.prefix}/state/optimizer.safetensors", b"{}")

    with at_work(to, job.queue):
        pass

    assert state_of(to, job) == JobState.SUCCEEDED
    said = messages(to, job)
    assert any(message.startswith(f"The checkpoint of step {newest.step} is not used: ") for message in said), said
    assert f"Training resumed at step {before.step} of 90" in said
    after = dict(losses(to, job)[len(before_that) :])
    assert all(after[step] == loss for step, loss in before_that if step > before.step)  # the same curve
    assert max(after) == 90
    with to.sessions() as session:
        again = session.scalars(select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.attempt == 2)).all()
    assert min(checkpoint.step for checkpoint in again) > before.step


def test_the_best_adapter_is_published_by_a_worker_that_did_not_train_it(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    asked = training.spec(n_epochs=20, checkpoint_every_steps=3, publish="best", optimizer={"warmup_ratio": 0})
    job = queued(to, organization, tiny, tmp_path, asked, has_validation=True)
    with at_work(to, job.queue) as first:
        eventually(lambda: len(checkpoints(to, job)) == 3)  # the newest, the one before, the best
        first.drain()
    best = min(checkpoints(to, job), key=lambda checkpoint: checkpoint.metrics["valid_loss"])

    with at_work(to, job.queue):
        pass

    said = messages(to, job)
    assert any(message.startswith(f"The adapter is that of step {best.step}: ") for message in said), said
    with to.sessions() as session:
        published, kept = (
            session.scalars(select(Adapter).where(Adapter.job_id == job.id, Adapter.step.is_not_distinct_from(step))).one()
            for step in (None, best.step)
        )
    weights = [to.storage.get(f"{adapter.prefix}/adapter_model.safetensors") for adapter in (published, kept)]
    assert weights[0] == weights[1]


def test_a_full_disk_is_told_as_one_and_the_job_goes_on_when_there_is_room(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    job = queued(to, organization, tiny, tmp_path, training.spec(n_epochs=30, checkpoint_every_steps=10))
    with small_disk.mounted(tmp_path / "disk", mib=4) as disk:
        full = replace(to, settings=to.settings.model_copy(update={"work_dir": disk / "work"}))
        with at_work(full, job.queue):
            eventually(lambda: checkpoints(to, job))
            eventually(lambda: small_disk.fill(disk) or state_of(to, job) == JobState.QUEUED)

        (said,) = [event for event in told(to, job) if event.data == {"code": "disk_full"}]
        assert said.level == "warn"
        reason = "the disk under the worker's TUNESMITH_WORK_DIR is full, and its operator has to free space there"
        assert said.message == f"The attempt broke off: {reason}; the job goes on from its last checkpoint"
        with to.sessions.begin() as session:
            mine = session.get_one(Job, job.id)
            assert (mine.not_before - said.created_at).total_seconds() > 30
            make.make_due(session, mine)
        newest = checkpoints(to, job)[0]
        small_disk.clear(disk)
        with at_work(full, job.queue):
            pass

    assert state_of(to, job) == JobState.SUCCEEDED
    assert f"Training resumed at step {newest.step} of 90" in messages(to, job)


def test_a_disk_that_is_full_before_the_training_is_told_too(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    job = queued(to, organization, tiny, tmp_path, training.spec())
    with small_disk.mounted(tmp_path / "disk", mib=1) as disk:
        small_disk.fill(disk)
        with at_work(replace(to, settings=to.settings.model_copy(update={"work_dir": disk / "work"})), job.queue):
            pass

    assert [event.level for event in told(to, job) if event.data == {"code": "disk_full"}] == ["warn"]
    assert state_of(to, job) == JobState.QUEUED


def of_this_process(*words: str) -> psutil.Process | None:
    """The child whose command line holds all these words."""
    children = psutil.Process().children(recursive=True)
    return next((child for child in children if all(word in command_of(child) for word in words)), None)


def test_a_job_that_is_paused_before_its_trainer_is_ready_does_not_wait_for_it(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    job = queued(to, organization, tiny, tmp_path, training.spec())
    with at_work(to, job.queue):
        eventually(lambda: of_this_process("worker.trainer"))
        trainer = of_this_process("worker.trainer")
        assert trainer is not None
        trainer.send_signal(signal.SIGSTOP)
        try:
            with to.sessions.begin() as session:
                jobs.pause(session, organization, job.id)
            eventually(lambda: state_of(to, job) == JobState.PAUSED)
            assert trainer.is_running()  # whoever comes next finds it warmer
        finally:
            trainer.send_signal(signal.SIGCONT)
    with to.sessions.begin() as session:
        jobs.resume(session, organization, job.id)
    with at_work(to, job.queue):
        pass

    assert state_of(to, job) == JobState.SUCCEEDED
    assert "Training started: 6 steps" in messages(to, job)


def test_a_cancelled_job_waits_neither_for_a_checkpoint_nor_for_storage(
    to: Services, organization: Caller, tiny: LoadedBase, tmp_path: Path
) -> None:
    job = queued(to, organization, tiny, tmp_path, training.spec(n_epochs=100, batch_size=1, checkpoint_every_steps=100))
    storage = of_this_process("nanio", "serve")
    assert storage is not None
    with at_work(to, job.queue):
        eventually(lambda: losses(to, job))
        storage.send_signal(signal.SIGSTOP)
        try:
            due = losses(to, job)[-1][0] + 100  # of 1,200
            eventually(lambda: losses(to, job)[-1][0] >= min(due, 1200))
            with to.sessions.begin() as session:
                jobs.cancel(session, organization, job.id)
            eventually(lambda: state_of(to, job) == JobState.CANCELLED)
            before = steps_kept(to, job)
        finally:
            storage.send_signal(signal.SIGCONT)

    assert steps_kept(to, job) == before  # what was on its way when it ended is not the job's any more
