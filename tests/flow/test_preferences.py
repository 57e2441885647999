"""What is trained otherwise than supervised goes the same way: SDK, events, result file, and a model that answers."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS


def created(client: OpenAI, training: bytes, validation: bytes, *, model: str = make.TINY, **asked: Any) -> FineTuningJob:
    files = {"training_file": training, "validation_file": validation}
    named = {name: client.files.create(file=("a.jsonl", body), purpose="fine-tune").id for name, body in files.items()}
    return client.fine_tuning.jobs.create(model=model, seed=3, **named, **asked)


def succeeded(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while job.status not in {"succeeded", "failed", "cancelled"} and time.monotonic() < deadline:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    return job


def metrics_of(client: OpenAI, job: FineTuningJob) -> list[dict[str, Any]]:
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))[::-1]
    return [event.data for event in events if event.type == "metrics"]  # type: ignore[misc]


def test_a_dpo_job_from_the_sdk_to_an_answer(client: OpenAI, tmp_path: Path) -> None:
    """With a tracker that is away all the while, which it does not feel, and a file for TensorBoard."""
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2, "batch_size": 8}}}
    trackers = [{"type": "mlflow", "mlflow": {"experiment": "away"}}, {"type": "tensorboard"}]
    job = succeeded(
        client, created(client, make.preference_file(24), make.preference_file(4), method=method, integrations=trackers)
    )
    said = metrics_of(client, job)

    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    steps, judged = ([data for data in said if name in data] for name in ("rewards/margin", "valid_rewards/margin"))
    assert len(steps) == 6 and judged and all(0 <= data["rewards/accuracy"] <= 1 for data in steps)
    header, *rows = client.files.content(job.result_files[0]).text.splitlines()
    assert header.split(",")[5:9] == ["rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin"]
    assert len(rows) == 6 and rows[-1].count(",") == header.count(",") == 12
    assert job.model_extra is not None and job.model_extra["trackers"] == trackers and job.integrations is None
    (tmp_path / "tfevents").write_bytes(client.files.content(job.result_files[-1]).content)
    margins = EventAccumulator(str(tmp_path)).Reload().Scalars("rewards/margin")
    assert [point.step for point in margins] == [data["step"] for data in steps]
    (*_, checkpoint) = list(client.fine_tuning.jobs.checkpoints.list(job.id))[::-1]
    assert "rewards/accuracy" in checkpoint.metrics.model_dump()
    assert answers(client, job)
    _goes_on_from(client, job, method)


def answers(client: OpenAI, job: FineTuningJob) -> bool:
    answer = client.chat.completions.create(
        model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "What comes after 3?"}], max_tokens=3
    )
    return answer.model == job.fine_tuned_model


def _goes_on_from(client: OpenAI, job: FineTuningJob, method: Any) -> None:
    """Another job on top of it, which compares with what the first has made."""
    asked = created(client, make.preference_file(8), make.preference_file(4), model=str(job.fine_tuned_model), method=method)
    again = succeeded(client, asked)
    first, *_ = metrics_of(client, again)

    assert (again.model_extra or {})["continue_from"] == job.fine_tuned_model != again.fine_tuned_model
    assert first["rewards/margin"] == 0 and first["train_loss"] == pytest.approx(math.log(2))


def test_orpo_and_kto_jobs_from_the_sdk_to_an_answer(client: OpenAI) -> None:
    hyperparameters = {"n_epochs": 1, "batch_size": 8}
    files = {"orpo": make.preference_file, "kto": make.rated_file}
    told = {"orpo": {"nll_loss", "log_odds_chosen", "rewards/margin"}, "kto": {"kl", "rewards/accuracy", "rewards/margin"}}
    jobs = {
        name: created(client, file(16), file(6), method={"type": name, name: {"hyperparameters": hyperparameters}})
        for name, file in files.items()
    }
    for name, begun in jobs.items():
        job = succeeded(client, begun)
        metrics = metrics_of(client, job)

        assert job.method is not None
        resolved = job.method.model_dump()[name]["hyperparameters"]
        assert {"beta": 0.1, "learning_rate_multiplier": 1.0, **hyperparameters}.items() <= resolved.items()
        assert len([data for data in metrics if told[name] <= data.keys()]) == 2
        assert any({f"valid_{metric}" for metric in told[name]} <= data.keys() for data in metrics)
        header = client.files.content(job.result_files[0]).text.splitlines()[0].split(",")
        assert told[name] <= set(header)
        assert answers(client, job)
    assert resolved["undesirable_weight"] == 10 / 6
