"""Sweeps through the API: all jobs or none, how they stand, the best of them."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import data
from app.jobs import leases
from app.models import Evaluation, EvaluationState, File, Job, JobState
from tests import make

Sessions = orm.sessionmaker[orm.Session]
URL = "/v1/fine_tuning/sweeps"


@pytest.fixture
def body(file_id: str) -> dict[str, Any]:
    grid = {"training.learning_rate": [1e-3, 1e-4], "adapter.rank": [8, 16]}
    return {"model": make.TINY, "training_file": file_id, "validation_file": file_id, "suffix": "mine", "grid": grid}


@pytest.fixture
def sweep(http: httpx.Client, body: dict[str, Any]) -> Callable[..., Any]:
    def post(**changes: Any) -> Any:
        answer = http.post(URL, json=body | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


def end(session: orm.Session, job_id: str, valid_loss: float | None) -> Job:
    """As a worker ends it: without a loss it fails."""
    job = make.prepared(session, session.get_one(Job, job_id))
    lease = make.claim(session, job)
    if valid_loss is None:
        leases.fail(session, lease, code="diverged", message="no")
    else:
        make.complete(session, lease, metrics={"valid_loss": valid_loss})
    return job


def test_a_sweep_is_its_jobs_and_the_best_so_far(
    http: httpx.Client, client: OpenAI, body: dict[str, Any], system_sessions: Sessions
) -> None:
    made: Any = client.post("/fine_tuning/sweeps", body=body, cast_to=object)
    ids = [job["job"] for job in made["jobs"]]
    assert (made["status_counts"], made["best"], made["is_final"]) == ({"validating_files": 4}, None, False)
    assert [list(names) for names in (made["grid"], made["jobs"][0]["values"])] == [list(body["grid"])] * 2  # in this order
    assert [job["user_provided_suffix"] for job in made["jobs"]] == ["mine-1", "mine-2", "mine-3", "mine-4"]
    job = client.fine_tuning.jobs.retrieve(ids[3]).model_dump()
    assert (job["sweep"], job["seed"], job["adapter"]["rank"]) == (made["id"], made["seed"], 16)

    with system_sessions.begin() as session:
        for job_id, loss in zip(ids, (1.5, None, 1.25, 1.25), strict=True):
            end(session, job_id, loss)
    told = http.get(f"{URL}/{made['id']}").json()

    assert [job["score"] for job in told["jobs"]] == [1.5, None, 1.25, 1.25]
    assert told["status_counts"] == {"succeeded": 3, "failed": 1} and told["is_final"]
    assert (told["best"]["job"], told["best"]["score"], told["best"]["tied_with"]) == (ids[2], 1.25, [ids[3]])
    assert told["best"]["values"] == {"training.learning_rate": 1e-4, "adapter.rank": 8}
    assert told["best"]["fine_tuned_model"] == client.fine_tuning.jobs.retrieve(ids[2]).fine_tuned_model
    assert http.get(URL).json()["data"] == [told]


def test_an_evaluation_may_decide(
    http: httpx.Client, sweep: Callable[..., Any], organization: Caller, system_sessions: Sessions
) -> None:
    with system_sessions.begin() as session:
        file = make.valid_file(session, organization)
        file.purpose = data.TO_EVALUATE
    made = sweep(metric={"type": "evaluation", "file": file.id, "grader": "g"})
    with system_sessions.begin() as session:
        models = [str(end(session, job["job"], 1.0).fine_tuned_model) for job in made["jobs"]]
    unscored = http.get(f"{URL}/{made['id']}").json()
    with system_sessions.begin() as session:
        add_evaluation(session, organization, file, models, [0.9, 0.2, 0.3, 0.4])
        add_evaluation(session, organization, file, models[:2], [0.1, 0.8])  # the newest counts, of those that it asks
    told = http.get(f"{URL}/{made['id']}").json()

    assert unscored["best"] is None and not unscored["is_final"]
    assert [job["score"] for job in told["jobs"]] == [0.1, 0.8, 0.3, 0.4]
    assert (told["best"]["job"], told["is_final"]) == (made["jobs"][1]["job"], True)


def add_evaluation(session: orm.Session, caller: Caller, file: File, models: list[str], means: list[float]) -> None:
    made, _ = make.evaluation(session, caller, models[0])
    made.state, made.lease_owner, made.lease_expires_at = EvaluationState.SUCCEEDED, None, None
    made.file_id, made.request = file.id, {**made.request, "models": models}
    made.results = {
        "models": [
            {"model": model, "grades": {"g": {"mean": mean, "low": mean, "high": mean, "rows": 4, "unscored": 0}}}
            for model, mean in zip(models, means, strict=True)
        ]
    }
    session.flush()
    assert session.get_one(Evaluation, made.id).file_id == file.id


def test_cancelling_ends_what_has_not_ended_and_twice_is_the_same_as_once(
    http: httpx.Client, sweep: Callable[..., Any], system_sessions: Sessions
) -> None:
    made = sweep()
    with system_sessions.begin() as session:
        end(session, made["jobs"][0]["job"], 1.0)
    once, twice = (http.post(f"{URL}/{made['id']}/cancel").json() for _ in range(2))

    assert once == twice
    assert once["status_counts"] == {"succeeded": 1, "cancelled": 3} and once["is_final"]
    assert once["best"]["job"] == made["jobs"][0]["job"]


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"grid": {}}, 400, "grid", "1 or more"),
        ({"grid": {"seed": []}}, 400, "grid.seed", "1 or more"),
        ({"grid": {"Bad Path": [1]}}, 400, None, "pattern"),
        ({"grid": {"training_file": ["file-none"]}}, 404, "training_file", "trial 1"),
        ({"grid": {"adapter.rank": [8, 16, 0]}}, 400, "adapter.rank", "trial 3"),
        ({"grid": {"training.optimizer": ["adamw_8bit", "paged_adamw_8bit"]}}, 400, "training.optimizer", "trial 2"),
        ({"metric": {"type": "evaluation", "file": "file-none", "grader": "g"}}, 404, "metric.file", "does not exist"),
        ({"metric": {"type": "luck"}}, 400, "metric", "valid_loss"),
        ({"random": {"trials": 0}}, 400, "random.trials", "1"),
        ({"dry_run": True}, 400, "dry_run", "one job"),
    ],
)
def test_all_jobs_are_made_or_none(
    http: httpx.Client,
    body: dict[str, Any],
    organization: Caller,
    system_sessions: Sessions,
    change: dict[str, Any],
    status: int,
    param: str | None,
    words: str,
) -> None:
    answer = http.post(URL, json=body | change)
    assert answer.status_code == status, answer.text
    error = make.require_envelope(status, answer.json())
    assert error["param"] == param or param is None
    assert words in str(error["message"]), error
    with system_sessions() as session:
        mine = select(func.count()).select_from(Job).where(Job.organization_id == organization.organization_id)
        assert session.scalar(mine) == 0


def test_the_sdks_own_retry_makes_no_second_sweep(
    http: httpx.Client, body: dict[str, Any], organization: Caller, system_sessions: Sessions
) -> None:
    first = http.post(URL, json=body).json()
    again = http.post(URL, json=body, headers={"x-stainless-retry-count": "1"}).json()
    other = http.post(URL, json=body).json()

    assert again == first and other["id"] != first["id"] and other["seed"] != first["seed"]
    with system_sessions() as session:
        mine = (Job.organization_id == organization.organization_id, Job.state == JobState.VALIDATING_FILES)
        assert session.scalar(select(func.count()).select_from(Job).where(*mine)) == 8
