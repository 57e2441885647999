import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.core import events
from app.jobs import leases
from app.models import Job
from tests import make


def test_a_new_job_has_all_that_the_sdk_expects(client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=file_id,
        suffix="mine",
        seed=5,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )

    assert (job.status, job.seed, job.error, job.result_files) == ("validating_files", 5, None, [])
    assert job.hyperparameters.n_epochs == 2
    assert job.metadata == {"team": "a"}
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    strict = type(job).model_validate(job.model_dump())  # the SDK's own type, without its lenience
    assert strict.id == job.id


def test_hyperparameters_count_wherever_they_are_sent(client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=file_id,
        hyperparameters={"n_epochs": 3, "batch_size": 4},
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 4, "learning_rate_multiplier": 0.5}}},
    )

    asked = job.hyperparameters
    assert (asked.n_epochs, asked.batch_size, asked.learning_rate_multiplier) == (3, 4, 0.5)


def test_jobs_are_listed_newest_first_and_by_metadata(client: OpenAI, file_id: str) -> None:
    ids = [client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, metadata={"n": str(n)}).id for n in range(3)]

    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [ids[1]]


def test_cancel_through_the_sdk(client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)

    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).finished_at is not None
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages == ["The job was cancelled", f"Created fine-tuning job: {job.id}"]


def test_events_and_checkpoints_page_through_the_sdk(
    client: OpenAI, file_id: str, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    with system_sessions.begin() as session:
        row = session.get_one(Job, job.id)
        row.state, row.queue = "queued", f"train.{job.id}"
        lease = make.claim(session, row)
        said: list[events.Event] = [events.Noted(level="info", message=str(n)) for n in range(30)]
        leases.heartbeat(session, lease, said, settings=make.LEASES)
        leases.checkpoint(session, lease, step=2, prefix="p", manifest=make.manifest(), metrics={"train_loss": 0.5})

    seen = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=7)]
    assert len(seen) == 33
    assert seen[1:31] == [str(n) for n in reversed(range(30))]
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (2, 0.5)
    assert checkpoint.fine_tuned_model_checkpoint.endswith(":ckpt-step-2")


def test_a_stranger_can_neither_see_nor_cancel(client: OpenAI, stranger: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    theirs = stranger.fine_tuning.jobs

    for call in (theirs.retrieve, theirs.cancel, theirs.list_events, theirs.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            call(job.id)
    with pytest.raises(openai.NotFoundError):
        theirs.create(model=make.TINY, training_file=file_id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"


def test_options_are_shown_as_they_were_asked_and_as_they_are_by_default(client: OpenAI, file_id: str) -> None:
    asked = {
        "adapter": {"use_dora": True, "rank": 8, "init_lora_weights": "gaussian"},
        "training": {"scheduler": "linear", "early_stopping": {"patience": 3}, "publish": "best", "validation_split": 0.2},
    }
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, extra_body=asked)
    shown = client.fine_tuning.jobs.retrieve(job.id).model_extra

    assert shown is not None and shown["auto"] is None  # nobody has looked at the files
    assert shown["adapter"] | asked["adapter"] == shown["adapter"]
    assert (shown["adapter"]["use_rslora"], shown["training"]["optimizer"]) == (False, "adamw_8bit")
    assert (shown["training"]["early_stopping"], shown["training"]["publish"]) == ({"patience": 3, "min_delta": 0.0}, "best")


def test_the_sdks_own_retry_makes_no_second_job(http: httpx.Client, file_id: str) -> None:
    body = {"model": make.TINY, "training_file": file_id}
    first = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    again = http.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "1"}).json()["id"]
    other = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]

    assert again == first != other


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "gpt-5"}, 404, "model", "model_not_found"),
        ({"training_file": "file-none"}, 404, "training_file", "file_not_found"),
        ({"training_file": None}, 400, "training_file", None),
        ({"validation_file": "file-none"}, 404, "validation_file", "file_not_found"),
        ({"suffix": "x" * 65}, 400, "suffix", None),
        ({"suffix": "a:b"}, 400, "suffix", None),
        ({"seed": -1}, 400, "seed", None),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", None),
        ({"hyperparameters": {"batch_size": "many"}}, 400, "hyperparameters.batch_size", None),
        ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters.beta", "unknown_parameter"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "unsupported_method"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations.0", "invalid_value"),
        ({"adapter": {"rank": 4096}}, 400, "adapter.rank", None),
        ({"adapter": {"target_modules": []}}, 400, "adapter.target_modules", None),
        ({"training": {"optimizer": "paged_adamw_8bit"}}, 400, "training.optimizer", "unsupported_parameter"),
        ({"quantization": {"double_quant": False}}, 400, "quantization.double_quant", "unsupported_parameter"),
        ({"quantization": {"scheme": "int8"}}, 400, "quantization.scheme", "unsupported_parameter"),
        ({"quantization": {"scheme": "int8", "double_quant": True}}, 400, "quantization", None),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata.k", None),
        ({"modle": "x"}, 400, "modle", "unknown_parameter"),
        ({"model": "llama-3.3-70b-instruct"}, 400, "model", "no_worker_for_model"),
    ],
)
def test_a_wrong_request_is_told_which_parameter_is_wrong(
    http: httpx.Client, file_id: str, change: dict[str, object], status: int, param: str, code: str | None
) -> None:
    answer = http.post("/v1/fine_tuning/jobs", json={"model": make.TINY, "training_file": file_id} | change)
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
