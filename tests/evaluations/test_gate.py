"""A trained model at its quality gate: the real API, a worker's tasks, a real engine whose model says what it is told to."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import func, orm, select, update
from sqlalchemy.exc import IntegrityError

from app import standing
from app.accounts.caller import Caller
from app.files.service import expire
from app.jobs import gates, states
from app.jobs import service as jobs
from app.models import Evaluation, EvaluationState, File, Job, JobState, WebhookDelivery
from tests import make as rows
from tests.embedded.patience import PATIENCE_SECONDS
from tests.evaluations import make
from tests.evaluations.make import EXACT, ScriptedRunner
from worker.services import Services
from worker.tasks import evaluate, gate

Sessions = orm.sessionmaker[orm.Session]
Trains = Callable[..., str]


def says(prompt: str, adapter: object | None) -> str:
    """The tuned model adds one, the base always says the same, which is right in one row of four."""
    number = int(prompt.rpartition(" + 1?")[0].split()[-1].rpartition(">")[2])
    return str(number + 1) if adapter else "1"


@pytest.fixture
def named(client: OpenAI, services: Services, model: ScriptedRunner) -> str:
    """An evaluation of the base, four rows."""
    model.says = says
    return str(make.create(client, make.upload(client, services, make.sums(4)), graders=[EXACT])["id"])


@pytest.fixture
def trains(named: str, system_sessions: Sessions, organization: Caller) -> Trains:
    """A job that has just been trained, and what it asks of its model."""

    def trained(alias: str | None = "prod", **asked: object) -> str:
        wanted = {"evaluation": named, "margin": 0.5} | asked
        with system_sessions.begin() as session:
            job = rows.queued_job(session, organization, quality_gate=wanted, alias=alias)
            rows.complete(session, rows.claim(session, job))
            return job.id

    return trained


def shown(http: httpx.Client, job_id: str) -> dict[str, Any]:
    return dict(http.get(f"/v1/fine_tuning/jobs/{job_id}").json())


def decided(http: httpx.Client, services: Services, job_id: str) -> dict[str, Any]:
    """Let a worker work until the job is over."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (now := shown(http, job_id))["status"] == "running":
        assert time.monotonic() < deadline, now
        if not (gate.conclude_next(services) or evaluate.evaluate_next(services)):
            time.sleep(0.05)
    return now


def chat(http: httpx.Client, model: str, **more: object) -> httpx.Response:
    asked = {"model": model, "messages": [{"role": "user", "content": "7 + 1?"}], **more}
    return http.post("/v1/chat/completions", json=asked)


def listed(http: httpx.Client) -> list[str]:
    return [model["id"] for model in http.get("/v1/models").json()["data"]]


def refusal(answer: httpx.Response) -> tuple[object, ...]:
    error = rows.require_envelope(answer.status_code, answer.json())
    return answer.status_code, error["code"], error["param"]


def test_a_model_that_passes_goes_live_with_its_alias(
    http: httpx.Client, client: OpenAI, services: Services, trains: Trains, named: str, system_sessions: Sessions
) -> None:
    endpoint = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.succeeded"])
    job_id = trains()
    waiting = shown(http, job_id)
    told = waiting["quality_gate"]
    name = told["model"]

    # until then it answers nobody
    assert (waiting["status"], waiting["fine_tuned_model"], waiting["finished_at"]) == ("running", None, None)
    assert (told["stage"], told["evaluation"], told["grader"], told["against"]) == ("evaluating", named, "exact", rows.TINY)
    assert name not in listed(http) and "prod" not in listed(http)
    asking = [chat(http, name), http.get(f"/v1/models/{name}")]
    asking += [http.post("/v1/model_aliases", json={"name": "x", "model": name})]
    asking += [http.post("/v1/evaluations", json={"file": make.get(client, named)["file"], "models": [name], "graders": [EXACT]})]
    assert [refusal(answer)[:2] for answer in asking] == [(404, "model_not_live")] * 4
    assert f"GET /v1/fine_tuning/jobs/{job_id}" in asking[0].text
    assert refusal(http.delete(f"/v1/models/{name}"))[:2] == (400, "model_in_use")
    assert refusal(http.delete(f"/v1/files/{make.get(client, named)['file']}"))[:2] == (400, "file_in_use")
    assert refusal(http.post(f"/v1/fine_tuning/jobs/{job_id}/publish"))[:2] == (400, "illegal_state")
    assert refusal(http.post(f"/v1/fine_tuning/jobs/{job_id}/pause"))[:2] == (400, "illegal_state")

    done = decided(http, services, job_id)
    verdict = done["quality_gate"]
    assert (done["status"], done["fine_tuned_model"], done["error"], done["alias"]) == ("succeeded", name, None, "prod")
    assert (verdict["stage"], verdict["score"], verdict["compared_score"], verdict["rows"]) == ("passed", 1.0, 0.25, 4)
    assert verdict["difference"] == 0.75 and verdict["low"] < 0.75 < verdict["high"]
    run = make.get(client, verdict["evaluation_run"])
    assert (run["job_id"], run["models"], run["request"]["graders"]) == (job_id, [rows.TINY, name], [EXACT])
    answer = chat(http, "prod").json()
    assert (answer["model"], answer["alias"], answer["choices"][0]["message"]["content"]) == (name, "prod", "8")
    assert '"alias":"prod"' in chat(http, "prod", stream=True).text and "alias" not in chat(http, name).json()
    (change,) = http.get("/v1/model_aliases/prod").json()["history"]
    assert (change["action"], change["model"], change["job_id"]) == ("created", name, job_id)
    with system_sessions() as session:
        sent = select(WebhookDelivery.event_type).where(WebhookDelivery.body.contains(job_id))
        assert session.scalars(sent).all() == ["fine_tuning.job.succeeded"]
    client.webhooks.delete(endpoint.id)  # what it has not been sent must not be due in other tests


def test_a_model_that_fails_is_kept_and_published_by_hand(
    http: httpx.Client, client: OpenAI, services: Services, trains: Trains
) -> None:
    http.post("/v1/model_aliases", json={"name": "prod", "model": rows.TINY})
    job_id = trains(margin=0.9)
    done = decided(http, services, job_id)
    name = done["quality_gate"]["model"]

    assert (done["status"], done["fine_tuned_model"], done["error"]["code"]) == ("failed", None, "quality_gate_failed")
    for words in ("1.0000", "0.2500", "0.7500", "at least 0.9", f"/jobs/{job_id}/publish"):
        assert words in done["error"]["message"]
    assert refusal(chat(http, name)) == (404, "model_not_live", "model")
    assert f"POST /v1/fine_tuning/jobs/{job_id}/publish" in chat(http, name).text
    published, again = (http.post(f"/v1/fine_tuning/jobs/{job_id}/publish").json() for _ in range(2))
    assert published == again
    assert (published["status"], published["fine_tuned_model"], published["quality_gate"]["stage"]) == ("failed", name, "failed")
    assert chat(http, name).status_code == 200 and name in listed(http)
    assert http.get("/v1/model_aliases/prod").json()["model"] == rows.TINY
    assert client.models.delete(name).deleted


def test_a_model_that_nobody_wants_is_deleted_without_having_been_live(
    http: httpx.Client, services: Services, trains: Trains
) -> None:
    job_id = trains(margin=0.9)
    name = decided(http, services, job_id)["quality_gate"]["model"]

    assert http.delete(f"/v1/models/{name}").json()["deleted"]
    assert refusal(http.post(f"/v1/fine_tuning/jobs/{job_id}/publish"))[:2] == (400, "no_model")


def test_a_job_cancelled_at_its_gate_ends_the_evaluation(
    http: httpx.Client, client: OpenAI, services: Services, trains: Trains
) -> None:
    job_id = trains()
    run = shown(http, job_id)["quality_gate"]["evaluation_run"]
    cancelled, again = (http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json() for _ in range(2))

    assert cancelled == again
    assert (cancelled["status"], cancelled["quality_gate"]["stage"]) == ("cancelled", "undecided")
    assert make.get(client, run)["status"] == "cancelled"
    assert not gate.conclude_next(services)
    assert http.get("/v1/model_aliases/prod").status_code == 404
    assert http.post(f"/v1/fine_tuning/jobs/{job_id}/publish").json()["fine_tuned_model"]


def test_an_evaluation_that_cannot_go_on_fails_the_job_with_its_reason(
    http: httpx.Client, client: OpenAI, services: Services, trains: Trains, system_sessions: Sessions
) -> None:
    stopped, broken = trains(), trains()
    for_job = {job_id: shown(http, job_id)["quality_gate"]["evaluation_run"] for job_id in (stopped, broken)}
    client.post(f"/evaluations/{for_job[stopped]}/cancel", cast_to=dict)  # type: ignore[type-var]
    with system_sessions.begin() as session:
        evaluation = session.get_one(Evaluation, for_job[broken])
        evaluation.request = evaluation.request | {"later": 1}
    errors = {job_id: decided(http, services, job_id)["error"] for job_id in for_job}

    assert {error["code"] for error in errors.values()} == {"quality_gate_undecided"}
    assert "the evaluation was cancelled" in errors[stopped]["message"]
    assert "another release has made this evaluation" in errors[broken]["message"]
    assert http.post(f"/v1/fine_tuning/jobs/{broken}/publish").json()["fine_tuned_model"]


def test_a_model_is_compared_with_what_the_alias_stands_for_when_it_is_replaced(
    http: httpx.Client, client: OpenAI, services: Services, trains: Trains
) -> None:
    """Another job has moved the alias while the first was evaluated: it is no longer the base that has to be beaten."""
    http.post("/v1/model_aliases", json={"name": "prod", "model": rows.TINY})
    replacing, late = trains(), trains(against="prod")
    while evaluate.evaluate_next(services):
        pass
    first_run = shown(http, late)["quality_gate"]["evaluation_run"]
    assert gate.conclude_next(services)
    early = shown(http, replacing)["fine_tuned_model"]
    done = decided(http, services, late)["quality_gate"]

    assert (done["against"], done["compared_with"], done["stage"], done["difference"]) == ("prod", early, "failed", 0.0)
    assert make.get(client, first_run)["status"] == "succeeded" and done["evaluation_run"] != first_run
    assert http.get("/v1/model_aliases/prod").json()["model"] == early


def test_a_file_whose_time_is_over_is_kept_until_the_gate_is_decided(
    http: httpx.Client, client: OpenAI, services: Services, named: str, trains: Trains, system_sessions: Sessions
) -> None:
    needed, other = make.get(client, named)["file"], make.upload(client, services, make.sums(2))
    job_id = trains()
    with system_sessions.begin() as session:
        over = update(File).where(File.id.in_((needed, other)))
        session.execute(over.values(expires_at=func.clock_timestamp() - timedelta(seconds=1)))
        session.execute(update(Evaluation).where(Evaluation.file_id == needed).values(state=EvaluationState.SUCCEEDED))
        expire(session)
        assert session.scalars(select(File.id).where(File.id.in_((needed, other)))).all() == [needed]
    http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    with system_sessions.begin() as session:
        expire(session)
        assert session.scalar(select(File.id).where(File.id == needed)) is None


def test_what_a_killed_worker_left_is_found_and_concluded_once(
    http: httpx.Client, services: Services, trains: Trains, system_sessions: Sessions
) -> None:
    job_id = trains()
    is_decidable = select(Job.id).where(Job.id == job_id, gates.decidable())
    with system_sessions() as session:
        assert session.scalar(is_decidable) is None
    while evaluate.evaluate_next(services):
        pass
    assert shown(http, job_id)["status"] == "running"
    with system_sessions() as session:
        assert session.scalar(is_decidable) == job_id
        assert standing.read(session, engine_timeout_seconds=1).queues["cpu"].count >= 1
        assert "cpu" in jobs.due_queues(session)

    assert gate.conclude_next(services) and not gate.conclude_next(services)
    assert shown(http, job_id)["status"] == "succeeded"
    with system_sessions() as session:
        assert session.scalar(is_decidable) is None


def test_no_release_lets_a_job_succeed_past_its_gate(trains: Trains, system_sessions: Sessions) -> None:
    job_id = trains()
    with pytest.raises(IntegrityError, match="gate_first"), system_sessions.begin() as session:
        states.move(session, session.get_one(Job, job_id), JobState.SUCCEEDED, "as an earlier release would")


def test_an_alias_is_evaluated_as_the_model_behind_it(http: httpx.Client, client: OpenAI, named: str, tuned: str) -> None:
    http.post("/v1/model_aliases", json={"name": "prod", "model": tuned})
    file = make.get(client, named)["file"]
    judge = {"type": "score_model", "name": "j", "model": "prod", "input": [{"role": "user", "content": "x"}]}
    made = make.create(client, file, rows.TINY, "prod", graders=[EXACT, judge])
    twice = http.post("/v1/evaluations", json={"file": file, "models": ["prod", tuned], "graders": [EXACT]})

    assert made["models"] == [rows.TINY, tuned]
    assert refusal(twice) == (400, "invalid_value", "models")


def test_a_gate_that_could_not_be_evaluated_is_refused_before_anything_is_trained(
    http: httpx.Client, client: OpenAI, services: Services, named: str, file_id: str, stranger: OpenAI
) -> None:
    file = make.get(client, named)["file"]
    two = make.create(client, file, graders=[EXACT, EXACT | {"name": "again"}])["id"]
    pairs = make.create(client, file, rows.TINY, "qwen2.5-7b-instruct", pairwise={"judge": rows.TINY})["id"]
    good = {"evaluation": named, "margin": 0.1}
    wrong: list[tuple[dict[str, object], int, str, str]] = [
        ({"quality_gate": good | {"evaluation": "eval_none"}}, 404, "quality_gate.evaluation", "GET /v1/evaluations"),
        ({"quality_gate": good | {"evaluation": pairs}}, 400, "quality_gate.evaluation", "nothing would be found out"),
        ({"quality_gate": good | {"evaluation": two}}, 400, "quality_gate.grader", "grades by exact, again"),
        ({"quality_gate": good | {"grader": "other"}}, 400, "quality_gate.grader", "grades by exact"),
        ({"quality_gate": good | {"against": "gpt-99"}}, 404, "quality_gate.against", "GET /v1/models"),
        ({"quality_gate": good | {"against": "qwen2.5-7b-instruct"}}, 400, "quality_gate.against", "on the same base"),
        ({"quality_gate": {"evaluation": named}}, 400, "quality_gate.margin", "required"),
        ({"quality_gate": good | {"margin": -0.1}}, 400, "quality_gate.margin", "greater than or equal to 0"),
        ({"quality_gate": good | {"margin": True}}, 400, "quality_gate.margin", "number"),
        ({"quality_gate": good | {"margin": 1e999}}, 400, "quality_gate.margin", "finite"),
        ({"quality_gate": good | {"confidence": 0.9}}, 400, "quality_gate.confidence", "must be null or 0.95"),
        ({"quality_gate": good, "alias": rows.TINY}, 400, "alias", "the name of a base model"),
        ({"alias": "a:b"}, 400, "alias", "pattern"),
    ]
    for change, status, param, words in wrong:
        for dry_run in (False, True):
            body = {"model": rows.TINY, "training_file": file_id, "dry_run": dry_run, **change}
            content = make.lines(body)
            answer = http.post("/v1/fine_tuning/jobs", content=content, headers={"content-type": "application/json"})
            assert refusal(answer)[::2] == (status, param), (change, answer.text)
            assert words in answer.text, (change, answer.text)
    own = stranger.files.create(file=("a.jsonl", rows.chat_file()), purpose="fine-tune").id
    with pytest.raises(openai.NotFoundError, match=named):
        stranger.fine_tuning.jobs.create(model=rows.TINY, training_file=own, extra_body={"quality_gate": good})
    assert client.fine_tuning.jobs.list().data == []
