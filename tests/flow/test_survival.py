"""A job outlives whoever works on it: same id, same curve, same bits, an event that says so."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from bench.chaos.house import adapter_sha256
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS
from tests.stack import Stack

SECONDS = PATIENCE_SECONDS
T = TypeVar("T")


def begin(client: OpenAI, *, epochs: int = 9, batch_size: int = 4) -> FineTuningJob:
    """A job that is busy for some seconds and keeps checkpoints on the way."""
    training = client.files.create(file=("train.jsonl", make.chat_file(64)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=training.id,
        seed=11,
        hyperparameters={"n_epochs": epochs, "batch_size": batch_size},
        extra_body={"training": {"checkpoint_every_steps": 16}},
    )


def wait_for_checkpoint(client: OpenAI, job: FineTuningJob) -> None:
    deadline = time.monotonic() + SECONDS
    while not client.fine_tuning.jobs.checkpoints.list(job.id).data:
        assert time.monotonic() < deadline, messages(client, job)
        time.sleep(0.1)


def wait_for_end(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + SECONDS
    while job.status not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, messages(client, job)
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def messages(client: OpenAI, job: FineTuningJob) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "message"][::-1]


def losses(client: OpenAI, job: FineTuningJob) -> dict[str, str]:
    """Step and loss, as the result file has them."""
    rows = client.files.content(job.result_files[0]).text.splitlines()[1:]
    return dict(row.split(",")[:2] for row in rows)


@pytest.fixture(scope="module")
def undisturbed(client: OpenAI) -> FineTuningJob:
    return wait_for_end(client, begin(client))


def test_a_job_survives_its_trainer_and_its_worker(stack: Stack, client: OpenAI, undisturbed: FineTuningJob) -> None:
    struck = begin(client)
    wait_for_checkpoint(client, struck)
    for trainer in stack.children("worker.trainer"):
        trainer.kill()
    struck = wait_for_end(client, struck)

    orphaned = begin(client)
    wait_for_checkpoint(client, orphaned)
    (worker,) = [child for child in stack.children("worker.train") if "worker.train" in child.cmdline()]
    worker.kill()
    orphaned = wait_for_end(client, orphaned)

    for job, word in ((struck, "broke off"), (orphaned, "fallen silent")):
        assert job.status == "succeeded"
        assert (job.model_extra or {})["attempt"] == 2
        told = messages(client, job)
        assert any(word in message for message in told), told
        assert any(message.startswith("Training resumed at step") for message in told), told
        assert losses(client, job) == losses(client, undisturbed)
        assert adapter_sha256(stack.storage(), job) == adapter_sha256(stack.storage(), undisturbed)


def test_a_paused_job_goes_on_where_it_was(stack: Stack, client: OpenAI, undisturbed: FineTuningJob) -> None:
    job = begin(client)
    wait_for_checkpoint(client, job)
    client.fine_tuning.jobs.pause(job.id)
    wait_until(lambda: is_paused(client, job))
    steps = len(client.fine_tuning.jobs.list_events(job.id, limit=100).data)
    time.sleep(2)
    assert is_paused(client, job) and len(client.fine_tuning.jobs.list_events(job.id, limit=100).data) == steps
    client.fine_tuning.jobs.resume(job.id)
    job = wait_for_end(client, job)

    assert job.status == "succeeded"
    assert losses(client, job) == losses(client, undisturbed)
    assert adapter_sha256(stack.storage(), job) == adapter_sha256(stack.storage(), undisturbed)


def is_paused(client: OpenAI, job: FineTuningJob) -> bool:
    found = client.fine_tuning.jobs.retrieve(job.id)
    return found.status == "queued" and (found.model_extra or {})["paused"] is True


def test_a_lost_broker_loses_nothing(stack: Stack, client: OpenAI) -> None:
    """Valkey comes back empty: rings are rung again, since the rows are still there."""
    for valkey in stack.children("valkey"):
        valkey.kill()
    job = wait_for_end(client, begin(client, epochs=1))

    assert job.status == "succeeded"
    assert (job.model_extra or {})["attempt"] == 1


def test_a_trainer_without_enough_memory_is_followed_by_one_that_takes_less_at_once(stack: Stack, client: OpenAI) -> None:
    (waiting,) = wait_until(lambda: stack.children("worker.trainer"))
    wait_until(lambda: waiting.num_threads() > 1 and waiting.cpu_percent(interval=1) < 5)  # it is warm
    waiting.rlimit(psutil.RLIMIT_AS, (waiting.memory_info().vms + 2**20, psutil.RLIM_INFINITY))
    starved = wait_for_end(client, begin(client, epochs=2, batch_size=64))

    told = messages(client, starved)
    assert starved.status == "succeeded", told
    assert any(message.startswith("Out of memory: going on with 1024 tokens at once") for message in told), told
    assert (starved.model_extra or {})["attempt"] == 1
    assert losses(client, starved).keys() == {"1", "2"}  # batches, however they were cut up


def wait_until(found: Callable[[], T]) -> T:
    deadline = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value
