"""Evaluations from the request to the verdict: the real API, a worker's task, a real engine with a scripted model."""

from datetime import timedelta

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import Update, func, orm, select, update

from app.accounts.caller import Caller
from app.core import catalog, ids
from app.core.errors import BadRequest
from app.core.settings import EvaluationSettings
from app.evaluations import leases, service
from app.evaluations.schemas import EvaluationCreate
from app.models import Engine, Evaluation, UsageRecord
from tests import make as rows
from tests.evaluations import make
from tests.evaluations.make import EXACT, ScriptedRunner
from worker.services import Services
from worker.tasks import evaluate

Sessions = orm.sessionmaker[orm.Session]


def successor(prompt: str) -> str:
    """What the chats of make.sums are held to."""
    return str(int(prompt.rpartition(" + 1?")[0].split()[-1].rpartition(">")[2]) + 1)


def test_two_models_are_compared_on_the_same_rows(client: OpenAI, services: Services, model: ScriptedRunner, tuned: str) -> None:
    """The tuned one is always right, the base in every fourth row."""
    model.says = lambda prompt, adapter: successor(prompt) if adapter or int(successor(prompt)) % 4 == 1 else "no"
    file = make.upload(client, services, make.sums(12))
    similar = EXACT | {"type": "text_similarity", "name": "similar", "evaluation_metric": "fuzzy_match"}
    del similar["operation"]
    made = make.create(client, file, rows.TINY, tuned, graders=[EXACT, similar], name="sums", seed=5)
    assert (made["object"], made["status"], made["samples"]) == ("evaluation", "queued", None)
    done = make.finish(client, services, made)

    assert (done["status"], done["samples"], done["answered"], done["error"]) == ("succeeded", 24, 24, None)
    base, ours = done["results"]["models"]
    assert (base["grades"]["exact"]["mean"], ours["grades"]["exact"]) == (
        0.25,
        {"mean": 1.0, "low": 1.0, "high": 1.0, "rows": 12, "unscored": 0},
    )
    assert base["grades"]["exact"]["low"] < 0.25 < base["grades"]["exact"]["high"]
    exact, close = done["results"]["comparisons"]
    assert (exact["model"], exact["against"], exact["grader"], exact["rows"]) == (tuned, rows.TINY, "exact", 12)
    assert (exact["difference"], exact["better"], exact["worse"], exact["test"]) == (0.75, 9, 0, "mcnemar")
    assert exact["p_value"] == pytest.approx(2 / 2**9)
    assert close["test"] in ("mcnemar", "paired_bootstrap") and close["difference"] > 0.5
    assert done["results"]["bootstrap"] == {"resamples": 10_000, "level": 0.95, "seed": 5}
    kept = make.samples(client, made["id"])
    assert [(sample["line"], sample["model"]) for sample in kept] == [(n, m) for n in range(1, 13) for m in (rows.TINY, tuned)]
    assert [sample["grades"]["exact"]["score"] for sample in kept[:4]] == [1, 1, 0, 1]
    assert kept[1]["answer"] == "1"


def test_what_an_evaluation_asks_is_metered_to_its_organization(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions, organization: Caller
) -> None:
    model.says = lambda _prompt, _adapter: "7"
    made = make.create(client, make.upload(client, services, make.sums(3)), graders=[EXACT])
    done = make.finish(client, services, made)
    with system_sessions() as session:
        records = session.scalars(select(UsageRecord).where(UsageRecord.organization_id == organization.organization_id)).all()

    (told,) = done["results"]["models"]
    assert len(records) == 3
    assert sum(record.prompt_tokens for record in records) == told["prompt_tokens"] > 0
    assert sum(record.completion_tokens for record in records) == told["completion_tokens"] == 6  # the digit and the end of turn


def test_what_was_answered_before_a_worker_died_is_not_asked_again(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.says = lambda prompt, _adapter: successor(prompt)
    made = make.create(client, make.upload(client, services, make.sums(20)), graders=[EXACT])
    monkeypatch.setattr(evaluate, "SLICE_SECONDS", 0.0)  # eight at once, and no more in a slice
    assert evaluate.evaluate_next(services)
    asked = len(model.asked)
    assert asked == make.get(client, made["id"])["answered"] == 8
    with system_sessions.begin() as session:  # another worker takes it and dies with it in hand
        assert leases.claim(session, owner="dead", settings=rows.LEASES, limits=EvaluationSettings()) is not None
        assert leases.claim(session, owner="too early", settings=rows.LEASES, limits=EvaluationSettings()) is None
        evaluation = session.get_one(Evaluation, made["id"])
        evaluation.lease_expires_at = func.clock_timestamp() - timedelta(seconds=1)
    monkeypatch.undo()
    done = make.finish(client, services, made)

    assert done["status"] == "succeeded"
    assert len(model.asked) == len(set(model.asked)) == 20
    assert done["results"]["models"][0]["grades"]["exact"]["mean"] == 1


def test_a_worker_that_was_given_up_says_nothing_more(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions
) -> None:
    made = make.create(client, make.upload(client, services, make.sums(2)), graders=[EXACT])
    with system_sessions.begin() as session:
        first = leases.claim(session, owner="a", settings=rows.LEASES, limits=EvaluationSettings())
        assert first is not None
        session.get_one(Evaluation, made["id"]).lease_expires_at = func.clock_timestamp() - timedelta(seconds=1)
        session.flush()
        second = leases.claim(session, owner="b", settings=rows.LEASES, limits=EvaluationSettings())
        assert second is not None and second.lease.attempt == first.lease.attempt + 1
        with pytest.raises(leases.EvaluationLost):
            leases.record_answer(session, first.lease, position=0, line=1, model=rows.TINY, answer=None)
    assert make.samples(client, made["id"]) == []


def test_an_evaluation_that_kills_its_workers_ends(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions
) -> None:
    made = make.create(client, make.upload(client, services, make.sums(2)), graders=[EXACT])
    for _ in range(rows.LEASES.max_attempts):
        with system_sessions.begin() as session:
            assert leases.claim(session, owner="w", settings=rows.LEASES, limits=EvaluationSettings()) is not None
            session.get_one(Evaluation, made["id"]).lease_expires_at = func.clock_timestamp() - timedelta(seconds=1)
    assert not evaluate.evaluate_next(services)

    assert make.get(client, made["id"])["error"]["code"] == "evaluation_failed"


def test_a_request_that_this_release_cannot_read_ends_its_own_evaluation(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions
) -> None:
    made, next_one = (make.create(client, make.upload(client, services, make.sums(1)), graders=[EXACT]) for _ in range(2))
    with system_sessions.begin() as session:
        evaluation = session.get_one(Evaluation, made["id"])
        evaluation.request = evaluation.request | {"later": 1}
    model.says = lambda prompt, _adapter: successor(prompt)

    assert make.finish(client, services, next_one)["status"] == "succeeded"
    assert make.get(client, made["id"])["error"]["code"] == "evaluation_outdated"


def test_cancelling_is_at_once_and_twice_is_the_same_as_once(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions
) -> None:
    made = make.create(client, make.upload(client, services, make.sums(2)), graders=[EXACT])
    with system_sessions.begin() as session:
        held = leases.claim(session, owner="w", settings=rows.LEASES, limits=EvaluationSettings())
    assert held is not None
    first, again = (client.post(f"/evaluations/{made['id']}/cancel", cast_to=dict) for _ in range(2))  # type: ignore[type-var]
    with pytest.raises(leases.EvaluationLost), system_sessions.begin() as session:
        leases.extend(session, held.lease, settings=rows.LEASES)

    assert first == again
    assert first["status"] == "cancelled" and first["finished_at"] is not None
    assert not evaluate.evaluate_next(services)


def test_an_engine_that_is_away_is_waited_for_and_the_owner_is_told(
    client: OpenAI, services: Services, model: ScriptedRunner, system_sessions: Sessions
) -> None:
    made = make.create(client, make.upload(client, services, make.sums(1)), graders=[EXACT])
    with system_sessions.begin() as session:
        session.execute(engine_aged())
    assert evaluate.evaluate_next(services)
    waiting = make.get(client, made["id"])

    assert waiting["status"] == "running"
    assert waiting["status_details"] == f"no engine serves {rows.TINY} just now; try again shortly"
    assert not evaluate.evaluate_next(services)  # not at once
    with system_sessions.begin() as session:
        evaluation = session.get_one(Evaluation, made["id"])
        assert evaluation.failures == 0
        evaluation.not_before = func.clock_timestamp()
        session.execute(engine_aged(by=timedelta(hours=-2)))
    model.says = lambda prompt, _adapter: successor(prompt)
    assert make.finish(client, services, made)["status"] == "succeeded"


def engine_aged(*, by: timedelta = timedelta(hours=2)) -> Update:
    """And with it those of this base that other tests have left a moment ago."""
    return update(Engine).where(Engine.base == rows.TINY).values(heartbeat_at=Engine.heartbeat_at - by)


def test_a_row_that_a_model_cannot_be_asked_has_its_reason_and_no_score(
    client: OpenAI, services: Services, model: ScriptedRunner
) -> None:
    model.says = lambda _prompt, _adapter: "2"
    body = make.lines({"item": {"q": "1 + 1?", "reference": "2"}}, {"item": {"q": "x" * 50_000}}, {"item": {"reference": "2"}})
    asked = [{"role": "user", "content": "Work out: {{item.q}}"}]
    done = make.finish(client, services, make.create(client, make.upload(client, services, body), graders=[EXACT], input=asked))
    (told,) = done["results"]["models"]
    right, long, lacking = make.samples(client, done["id"])

    assert (told["answered"], told["failed"]) == (1, 2)
    assert told["grades"]["exact"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "rows": 1, "unscored": 2}
    assert "Work out: 1 + 1?" in model.asked[0]
    assert (right["error"], right["answer"]) == (None, "2")
    assert (long["error"]["code"], lacking["error"]["code"]) == ("context_length_exceeded", "invalid_variable")


def test_an_evaluation_of_which_nothing_can_be_scored_fails_and_says_where_to_look(
    client: OpenAI, services: Services, model: ScriptedRunner
) -> None:
    grader = EXACT | {"reference": "{{item.gone}}"}
    done = make.finish(client, services, make.create(client, make.upload(client, services, make.sums(2)), graders=[grader]))

    assert (done["status"], done["error"]["code"]) == ("failed", "nothing_scored")
    assert make.samples(client, done["id"])[0]["grades"]["exact"]["error"] == "invalid_variable_error"


def test_multiple_choice_is_asked_and_scored_by_letters(client: OpenAI, services: Services, model: ScriptedRunner) -> None:
    model.says = lambda prompt, _adapter: "The answer is B." if "B. Paris" in prompt else "C"
    body = make.lines(
        {"question": "Capital of France?", "choices": ["Rome", "Paris"], "answer": 1},
        {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": "B", "subject": "sums"},
    )
    done = make.finish(client, services, make.create(client, make.upload(client, services, body)))

    assert [sample["grades"]["accuracy"]["score"] for sample in make.samples(client, done["id"])] == [1, 0]
    assert done["results"]["models"][0]["grades"]["accuracy"]["mean"] == 0.5
    assert any("A. Rome\nB. Paris" in asked for asked in model.asked)


def test_a_judge_compares_in_both_orders_and_its_love_of_a_place_shows(
    client: OpenAI, services: Services, model: ScriptedRunner, tuned: str
) -> None:
    """Row 1: it knows the better one. Row 2: it always takes the first. Row 3: a tie. Row 4: it babbles."""

    def says(prompt: str, adapter: object | None) -> str:
        if "You compare two answers" not in prompt:
            return "good" if adapter else "bad"
        if "0 + 1?" in prompt:
            return '{"result": "%s"}' % ("A" if "Answer A:\ngood" in prompt else "B")
        return {"1 + 1?": '{"result": "A"}', "2 + 1?": "tie"}.get(prompt.partition("[user] ")[2][:6], "hm")

    model.says = says
    file = make.upload(client, services, make.sums(4))
    done = make.finish(client, services, make.create(client, file, rows.TINY, tuned, pairwise={"judge": rows.TINY}))
    (told,) = done["results"]["pairwise"]

    assert (told["model"], told["against"], told["rows"]) == (tuned, rows.TINY, 3)
    assert (told["wins"], told["losses"], told["ties"], told["unreadable"]) == (1, 0, 2, 1)
    assert told["changed_with_the_order"] == 1
    assert told["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert told["position"] == {"first": 3, "second": 1, "tie": 2, "first_share": 0.75}
    assert [sample["verdict"] and sample["verdict"]["outcome"] for sample in make.samples(client, done["id"])] == [
        None, "win", None, "tie", None, "tie", None, None,
    ]  # fmt: skip


def test_a_judge_scores_within_its_range(client: OpenAI, services: Services, model: ScriptedRunner) -> None:
    def says(prompt: str, _adapter: object | None) -> str:
        _, is_judge, rated = prompt.partition("Rate: ")
        return {"1": '{"result": 4}', "2": "9"}[rated[0]] if is_judge else successor(prompt)

    model.says = says
    judge = {"type": "score_model", "name": "j", "model": rows.TINY, "range": [1, 5]}
    judge["input"] = [{"role": "user", "content": "Rate: {{sample.output_text}}"}]
    done = make.finish(client, services, make.create(client, make.upload(client, services, make.sums(2)), graders=[judge]))
    first, second = (sample["grades"]["j"] for sample in make.samples(client, done["id"]))

    assert first == {"score": 4}
    assert (second["score"], second["error"]) == (None, "model_grader_parse_error")
    assert done["results"]["models"][0]["grades"]["j"]["unscored"] == 1


def test_a_file_that_turns_out_bad_ends_its_evaluation(client: OpenAI, services: Services, model: ScriptedRunner) -> None:
    file = client.files.create(file=("a.jsonl", b"{"), purpose="evals").id
    made = make.create(client, file, graders=[EXACT])
    assert not evaluate.evaluate_next(services)  # it has not been read yet
    make.upload(client, services, make.sums(1))
    done = make.finish(client, services, made)

    assert (done["error"]["code"], done["error"]["param"]) == ("invalid_file", "file")


def test_a_file_in_use_is_kept_until_the_evaluation_is_over(client: OpenAI, services: Services, model: ScriptedRunner) -> None:
    file = make.upload(client, services, make.sums(1))
    made = make.create(client, file, graders=[EXACT])
    with pytest.raises(openai.BadRequestError, match=f"in use by evaluation {made['id']}"):
        client.files.delete(file)
    client.post(f"/evaluations/{made['id']}/cancel", cast_to=dict)  # type: ignore[type-var]

    assert client.files.delete(file).deleted


def test_a_large_evaluation_is_refused_with_its_size(
    client: OpenAI, services: Services, system_sessions: Sessions, organization: Caller
) -> None:
    file = make.upload(client, services, make.sums(5))
    request = EvaluationCreate.model_validate({"file": file, "models": [rows.TINY], "graders": [EXACT]})
    small = {"5 rows × 1 models are 5 samples": {"max_samples": 4}, "at most 9": {"max_file_bytes": 9}}
    for words, limits in small.items():
        with system_sessions() as session, pytest.raises(BadRequest, match=words):
            service.create(
                session, organization, catalog.load(), request=request, judges=(), settings=EvaluationSettings(**limits)
            )


GOOD = {"models": [rows.TINY], "graders": [EXACT]}
SCORE = {"type": "score_model", "name": "j", "input": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"file": "file-none"}, 404, "file", "GET /v1/files"),
        ({"models": ["gpt-99"]}, 404, "models", "GET /v1/models"),
        ({"models": []}, 400, "models", "1 or more"),
        ({"models": [rows.TINY, rows.TINY]}, 400, "models", "twice"),
        ({"models": [f"m{n}" for n in range(9)]}, 400, "models", "at most 8"),
        ({"graders": []}, 400, "graders", "nothing would be found out"),
        ({"graders": [EXACT, EXACT]}, 400, "graders", "one name"),
        ({"graders": [{"type": "python", "name": "p"}]}, 400, "graders.0", "runs no programs"),
        ({"graders": [EXACT | {"input": "{{x}}"}]}, 400, "graders.0.input", "{{item.name}}"),
        ({"graders": [EXACT | {"operation": "is"}]}, 400, "graders.0.operation", "'eq', 'ne', 'like' or 'ilike'"),
        ({"graders": [SCORE | {"model": "gpt-99"}]}, 404, "graders.0.model", "does not exist"),
        ({"graders": [SCORE | {"model": "http://169.254.169.254/v1"}]}, 404, "graders.0.model", "does not exist"),
        ({"graders": [{"type": "json_schema", "name": "s", "json_schema": {"type": 7}}]}, 400, "grader", "json_schema of 's'"),
        ({"input": [{"role": "user", "content": "x"}]}, 400, "input", "remove input"),
        ({"pairwise": {"judge": rows.TINY}}, 400, "models", "at least two"),
        ({"sampling": {"temperature": 3}}, 400, "sampling.temperature", "2"),
        ({"rows": 5}, 400, "rows", "remove it"),
    ],
)
def test_a_wrong_request_is_told_which_parameter_is_wrong(
    http: httpx.Client, client: OpenAI, services: Services, change: dict[str, object], status: int, param: str, words: str
) -> None:
    file = make.upload(client, services, make.sums(1))
    answer = http.post("/v1/evaluations", json=GOOD | {"file": file} | change)
    error = rows.require_envelope(answer.status_code, answer.json())

    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in str(error["message"]), error
    assert client.get("/evaluations", cast_to=dict)["data"] == []  # type: ignore[type-var]


def test_a_file_to_train_on_is_not_evaluated_with_and_the_other_way_round(
    client: OpenAI, services: Services, file_id: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="upload it with purpose 'evals'"):
        make.create(client, file_id, graders=[EXACT])
    with pytest.raises(openai.BadRequestError, match="upload it with purpose 'fine-tune'"):
        client.fine_tuning.jobs.create(model=rows.TINY, training_file=make.upload(client, services, make.sums(1)))


def test_evaluations_and_their_answers_are_paged(client: OpenAI, services: Services, model: ScriptedRunner) -> None:
    file = make.upload(client, services, make.sums(5))
    made = [make.create(client, file, graders=[EXACT])["id"] for _ in range(3)]
    first = client.get("/evaluations?limit=2", cast_to=dict)  # type: ignore[type-var]
    rest = client.get(f"/evaluations?limit=2&after={first['last_id']}", cast_to=dict)  # type: ignore[type-var]
    assert [one["id"] for one in (*first["data"], *rest["data"])] == made[::-1]
    make.finish(client, services, make.get(client, made[0]))
    path = f"/evaluations/{made[0]}/results?limit=3"
    page = client.get(path, cast_to=dict)  # type: ignore[type-var]
    second = client.get(f"{path}&after={page['last_id']}", cast_to=dict)  # type: ignore[type-var]

    assert [sample["line"] for sample in (*page["data"], *second["data"])] == [1, 2, 3, 4, 5]
    assert (page["has_more"], second["has_more"]) == (True, False)
    assert client.get(f"{path}&after={ids.new('evalsample_')}", cast_to=dict) == page  # type: ignore[type-var]
