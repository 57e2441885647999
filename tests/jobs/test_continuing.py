"""Jobs that go on from one of the caller's own models: what they take over, what they refuse, what they keep from deletion."""

from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.adapters import service as adapters
from app.core.spec import Requested
from app.models import Adapter, Job
from tests import make

SHAPE = {"rank": 8, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}


@pytest.fixture
def tuned(system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> str:
    """A finished model of the client's, of an unusual shape, with a checkpoint."""
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        assert job.spec is not None
        job.spec = {**job.spec, "lora": SHAPE}
        lease = make.claim(session, job)
        make.checkpoint(session, lease)
        make.complete(session, lease)
        return str(job.fine_tuned_model)


@pytest.mark.parametrize("way", ["continue_from", "model", "checkpoint"])
def test_the_shape_is_the_models_and_all_else_is_fresh(
    client: OpenAI, file_id: str, tuned: str, system_sessions: orm.sessionmaker[orm.Session], way: str
) -> None:
    name = f"{tuned}:ckpt-step-1" if way == "checkpoint" else tuned
    said: dict[str, Any] = {"model": name} if way == "model" else {"model": make.TINY, "extra_body": {"continue_from": name}}
    made = client.fine_tuning.jobs.create(training_file=file_id, **said)
    shown = made.model_dump()

    assert (made.model, shown["base_model"], shown["continue_from"]) == (said["model"], make.TINY, name)
    assert shown["adapter"] == shown["adapter"] | SHAPE | {"dropout": 0.0}
    assert shown["training"]["learning_rate"] == "auto"
    with system_sessions() as session:
        job = session.get_one(Job, made.id)
        start, asked = adapters.find_start(session, job), Requested.model_validate(job.request)
    assert start is not None and asked.continue_from is not None
    assert (start.digest, start.base) == (asked.continue_from.digest, make.TINY)


def test_what_is_said_again_is_no_contradiction(client: OpenAI, file_id: str, tuned: str) -> None:
    said = {"continue_from": tuned, "adapter": {**SHAPE, "target_modules": ["v_proj", "q_proj"], "dropout": 0.1}}
    made = client.fine_tuning.jobs.create(model=tuned, training_file=file_id, extra_body=said).model_dump()

    assert (made["adapter"]["rank"], made["adapter"]["dropout"]) == (8, 0.1)


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"adapter": {"rank": 16}}, 400, "adapter.rank", "has rank 8"),
        ({"adapter": {"target_modules": "all-linear"}}, 400, "adapter.target_modules", "leave adapter.target_modules out"),
        ({"adapter": {"use_dora": True}}, 400, "adapter.use_dora", "cannot change"),
        ({"adapter": {"init_lora_weights": "gaussian"}}, 400, "adapter.init_lora_weights", "the weights are those of"),
        ({"model": "smollm2-135m-instruct"}, 400, "model", "is tuned from tiny-random-llama"),
        ({"model": "ft:other"}, 400, "continue_from", "name two models"),
        ({"continue_from": "ft:none"}, 404, "continue_from", "does not exist or is not yours"),
        ({"continue_from": None, "model": "ft:none"}, 404, "model", "does not exist or is not yours"),
        ({"continue_from": make.TINY}, 404, "continue_from", "does not exist or is not yours"),
        ({"continue_from": 3}, 400, "continue_from", "string"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    http: httpx.Client, file_id: str, tuned: str, change: dict[str, object], status: int, param: str, words: str
) -> None:
    body = {"model": make.TINY, "training_file": file_id, "continue_from": tuned, **change}
    for is_dry in (False, True):
        answer = http.post("/v1/fine_tuning/jobs", json={**body, "dry_run": is_dry})
        error = make.require_envelope(status, answer.json())
        assert (answer.status_code, error["param"]) == (status, param) and words in str(error["message"]), error


def test_a_model_that_a_job_continues_is_not_deleted(http: httpx.Client, client: OpenAI, file_id: str, tuned: str) -> None:
    job = client.fine_tuning.jobs.create(model=tuned, training_file=file_id)
    refused = http.delete(f"/v1/models/{tuned}")
    assert refused.status_code == 400
    assert job.id in str(make.require_envelope(400, refused.json())["message"])
    assert client.models.delete(f"{tuned}:ckpt-step-1").deleted  # nobody goes on from that one

    client.fine_tuning.jobs.cancel(job.id)
    assert client.models.delete(tuned).deleted
    assert client.fine_tuning.jobs.retrieve(job.id).model_dump()["continue_from"] == tuned


def test_a_checkpoint_that_may_yet_be_written_anew_is_not_continued(
    http: httpx.Client, file_id: str, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        make.checkpoint(session, make.claim(session, job))
    answer = http.post("/v1/fine_tuning/jobs", json={"model": f"{adapters.name_of(job, step=1)}", "training_file": file_id})

    error = make.require_envelope(400, answer.json())
    assert (answer.status_code, error["code"], error["param"]) == (400, "model_in_use", "model")


def test_a_start_that_is_gone_is_not_found(
    organization: Caller, client: OpenAI, file_id: str, tuned: str, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    """As an earlier release, which knows of no job that continues a model, may have left it."""
    made = client.fine_tuning.jobs.create(model=tuned, training_file=file_id)
    with system_sessions.begin() as session:
        session.query(Adapter).filter(Adapter.name == tuned).delete()
    with system_sessions() as session:
        assert adapters.find_start(session, session.get_one(Job, made.id)) is None
