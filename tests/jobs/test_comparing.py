"""Jobs side by side: what is told of each, and that only differences are."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core import events
from app.jobs import leases
from app.jobs.comparing import Point, curves_of, thinned
from app.models import Evaluation, EvaluationState, Job
from tests import make

Sessions = orm.sessionmaker[orm.Session]
GRADE = {"mean": 0.75, "low": 0.5, "high": 1.0, "rows": 4, "unscored": 0}


@pytest.fixture
def compare(http: httpx.Client) -> Callable[..., Any]:
    def ask(*ids: str, **asked: object) -> Any:
        answer = http.get("/v1/fine_tuning/jobs/compare", params={"ids": ",".join(ids), **asked})  # type: ignore[dict-item]
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    return ask


def stepped(step: int, loss: float) -> events.Stepped:
    return events.Stepped(
        step=step,
        total_steps=6,
        train_loss=loss,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=100,
        labelled_tokens=40,
        tokens_left=0,
        tokens_per_second=10.0,
    )


def finished_job(session: orm.Session, caller: Caller, losses: tuple[float, ...], **asked: object) -> Job:
    """It has an evaluation every second step, took its first step twice, and has published the last evaluation but one."""
    job = make.queued_job(session, caller, seed=1, **asked)
    lease = make.claim(session, job)
    said: list[events.Event] = [stepped(1, 9.0)]
    for step in range(1, 2 * len(losses) + 1):
        said.append(stepped(step, 3.0 / step))
        if step % 2 == 0:
            said.append(events.Evaluated(step=step, valid_loss=losses[step // 2 - 1], valid_mean_token_accuracy=0.4))
    leases.heartbeat(session, lease, said, settings=make.LEASES)
    make.checkpoint(session, lease, step=2)
    make.complete(session, lease, metrics={"valid_loss": losses[-2]})
    return job


def evaluated(session: orm.Session, caller: Caller, model: str) -> Evaluation:
    made, _ = make.evaluation(session, caller, model)
    made.state, made.lease_owner, made.lease_expires_at = EvaluationState.SUCCEEDED, None, None
    made.results = {"models": [{"model": model, "grades": {"g": GRADE}}]}
    session.flush()
    return made


def test_jobs_are_told_by_what_differs_and_how_they_went(
    compare: Callable[..., Any], organization: Caller, system_sessions: Sessions
) -> None:
    with system_sessions.begin() as session:
        file = make.valid_file(session, organization)
        small = finished_job(session, organization, (2.0, 1.0, 1.5), training_file=file, adapter={"rank": 8})
        large = finished_job(
            session, organization, (2.0, 3.0), training_file=file, training={"learning_rate": 0.01}, metadata={"a": "b"}
        )
        whole, of_checkpoint = (
            evaluated(session, organization, name)
            for name in (f"{small.fine_tuned_model}", f"{small.fine_tuned_model}:ckpt-step-2")
        )
        small.held_out = {"examples": 3}
    first, second = compare(large.id, small.id)

    assert (first["id"], second["id"], first["metadata"]) == (large.id, small.id, {"a": "b"})
    assert first["requested"] == {"adapter.rank": 16, "training.learning_rate": 0.01}
    assert second["requested"] == {"adapter.rank": 8, "training.learning_rate": "auto"}
    assert first["resolved"] == {"lora.rank": 16, "optimizer.learning_rate": 0.01}
    assert second["resolved"] == {"lora.rank": 8, "optimizer.learning_rate": 0.001}
    assert second["validation"] == {
        "final": {"step": 6, "valid_loss": 1.5},
        "best": {"step": 4, "valid_loss": 1.0},
        "published": 1.0,
    }
    assert (second["held_out"], first["held_out"]) == ({"examples": 3}, None)
    train, validation = second["curves"]["train"], second["curves"]["validation"]
    assert [(point["step"], point["tokens"], point["metrics"]["train_loss"]) for point in train] == [
        (step, 100 * step, 3.0 / step) for step in range(1, 7)
    ]
    assert [(point["step"], point["tokens"], point["metrics"]["valid_loss"]) for point in validation] == [
        (2, 200, 2.0),
        (4, 400, 1.0),
        (6, 600, 1.5),
    ]
    assert second["trained_tokens"] == second["price"]["tokens"] == 100
    assert second["status"] == "succeeded" and second["duration_seconds"] >= 0
    assert [(one["id"], one["model"], one["status"]) for one in second["evaluations"]] == [
        (of_checkpoint.id, f"{small.fine_tuned_model}:ckpt-step-2", "succeeded"),
        (whole.id, small.fine_tuned_model, "succeeded"),
    ]
    assert second["evaluations"][0]["grades"] == {"g": {name: GRADE[name] for name in ("mean", "low", "high", "rows")}}
    assert second["evaluations"][0]["url"] == f"/v1/evaluations/{of_checkpoint.id}"
    assert first["evaluations"] == []


def test_a_job_that_has_not_begun_is_compared_too_and_long_curves_are_thinned(
    compare: Callable[..., Any], organization: Caller, system_sessions: Sessions
) -> None:
    with system_sessions.begin() as session:
        done = finished_job(session, organization, (2.0, 1.0, 1.5))
        new = make.job(session, organization, seed=1)
    waiting, ended = compare(new.id, done.id, points=2)

    assert (waiting["status"], waiting["resolved"], waiting["validation"], waiting["price"]) == (
        "validating_files",
        None,
        None,
        None,
    )
    assert waiting["curves"] == {"train": [], "validation": []} and ended["resolved"] == {}
    assert [point["step"] for point in ended["curves"]["train"]] == [1, 6]


def test_curves_are_thinned_evenly_with_both_ends() -> None:
    curve, _ = curves_of({step: {"step": step, "tokens": 1, "train_loss": 0.5} for step in range(1, 101)})
    thin = thinned(curve, 10)

    assert [point.step for point in thin] == [1, 12, 23, 34, 45, 56, 67, 78, 89, 100]
    assert thin[-1] == Point(step=100, tokens=100, metrics={"train_loss": 0.5})
    assert thinned(curve, 100) == curve


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("", 400, "ids is required"),
        ("ids=", 400, "names 0 different jobs"),
        ("ids=ftjob-a,ftjob-a", 400, "names 1 different jobs"),
        ("ids=" + ",".join(f"ftjob-{n}" for n in range(21)), 400, "name 2 to 20"),
        ("ids=ftjob-a&ids=ftjob-b", 404, "ftjob-a, ftjob-b"),
        ("ids=ftjob-a,ftjob-b&points=1", 400, "points"),
        ("ids=ftjob-a,%00", 400, "cannot be stored"),
    ],
)
def test_what_cannot_be_compared_is_told(http: httpx.Client, query: str, status: int, words: str) -> None:
    answer = http.get(f"/v1/fine_tuning/jobs/compare?{query}")
    error = make.require_envelope(status, answer.json())

    assert answer.status_code == status and words in str(error["message"]), error
