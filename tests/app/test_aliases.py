"""Aliases as their owners use them: made, moved, rolled back, and every step written down."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import orm, text
from sqlalchemy.exc import ProgrammingError

from app import db
from app.accounts.caller import Caller
from tests import make

Sessions = orm.sessionmaker[orm.Session]


@pytest.fixture
def models(system_sessions: Sessions, organization: Caller) -> list[str]:
    """Three tuned models, the oldest first."""
    with system_sessions.begin() as session:
        return [make.tuned_model(session, organization) for _ in range(3)]


def post(http: httpx.Client, path: str = "", **body: str) -> dict[str, Any]:
    answer = http.post(f"/v1/model_aliases{path}", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(answer: httpx.Response, status: int, code: str, words: str, param: str | None = None) -> None:
    error = make.require_envelope(answer.status_code, answer.json())
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert words in str(error["message"]), error


def history(http: httpx.Client, name: str = "prod") -> list[tuple[str, int, str]]:
    """The oldest change first."""
    told = http.get(f"/v1/model_aliases/{name}").json()["history"]
    return [(change["action"], change["version"], change["model"]) for change in told[::-1]]


def test_an_alias_is_moved_and_rolled_back_down_its_history(http: httpx.Client, models: list[str], organization: Caller) -> None:
    first, second, third = models
    made = post(http, name="prod", model=first)
    assert post(http, name="prod", model=first) == made  # made once
    for model in (second, third, third):
        post(http, "/prod", model=model)
    back = post(http, "/prod/rollback")
    assert (back["model"], back["version"], back["previous_version"]) == (second, 2, 1)
    moved = post(http, "/prod", model=third)
    assert (moved["version"], moved["previous_version"]) == (4, 2)  # the way back leads to what it was before
    assert [post(http, "/prod/rollback")["model"] for _ in range(2)] == [second, first]
    refused(http.post("/v1/model_aliases/prod/rollback"), 400, "alias_at_first_version", f"at its first version, {first}")

    assert history(http) == [
        ("created", 1, first),
        ("moved", 2, second),
        ("moved", 3, third),
        ("rolled_back", 2, second),
        ("moved", 4, third),
        ("rolled_back", 2, second),
        ("rolled_back", 1, first),
    ]
    page = http.get("/v1/model_aliases/prod/history?limit=2").json()
    rest = http.get(f"/v1/model_aliases/prod/history?after={page['last_id']}").json()
    assert (page["has_more"], len(page["data"]), len(rest["data"])) == (True, 2, 5)
    assert [(change["job_id"], change["api_key_id"]) for change in page["data"]] == [(None, page["data"][0]["api_key_id"])] * 2
    assert [alias["name"] for alias in http.get("/v1/model_aliases").json()["data"]] == ["prod"]


def test_a_rollback_that_the_sdk_repeats_is_carried_out_once(http: httpx.Client, models: list[str]) -> None:
    post(http, name="prod", model=models[0])
    for model in models[1:]:
        post(http, "/prod", model=model)
    first = post(http, "/prod/rollback")
    repeated = http.post("/v1/model_aliases/prod/rollback", headers={"x-stainless-retry-count": "1"}).json()

    assert repeated == first and first["model"] == models[1]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (make.TINY, "alias_is_model", "the name of a base model"),
        (f"ft:{make.TINY}:x::y", "invalid_value", "pattern"),
        ("a/b", "invalid_value", "pattern"),
        ("x" * 65, "invalid_value", "at most 64"),
    ],
)
def test_a_name_that_a_model_has_or_could_have_is_refused(http: httpx.Client, name: str, code: str, words: str) -> None:
    refused(http.post("/v1/model_aliases", json={"name": name, "model": make.TINY}), 400, code, words, "name")


def test_what_an_alias_cannot_stand_for_is_refused(http: httpx.Client, models: list[str]) -> None:
    post(http, name="prod", model=make.TINY)
    for path, body in (("", {"name": "next", "model": "gpt-99"}), ("/prod", {"model": "gpt-99"})):
        refused(http.post(f"/v1/model_aliases{path}", json=body), 404, "model_not_found", "GET /v1/models", "model")
    chained = http.post("/v1/model_aliases", json={"name": "next", "model": "prod"})
    refused(chained, 400, "invalid_value", "is an alias itself", "model")
    other = http.post("/v1/model_aliases", json={"name": "prod", "model": models[0]})
    refused(other, 400, "alias_exists", "POST /v1/model_aliases/prod moves it", "name")
    refused(http.post("/v1/model_aliases/none", json={"model": make.TINY}), 404, "alias_not_found", "GET /v1/model_aliases")

    assert history(http) == [("created", 1, make.TINY)]


def test_models_list_their_aliases_and_neither_is_deleted_through_the_other(
    http: httpx.Client, client: OpenAI, models: list[str]
) -> None:
    post(http, name="prod", model=models[0])
    post(http, name="plain", model=make.TINY)
    listed = {model.id: (model.model_extra or {}) for model in client.models.list()}
    assert {name: (listed[name]["alias_of"], listed[name]["base_model"]) for name in ("prod", "plain", models[0])} == {
        "prod": (models[0], make.TINY),
        "plain": (make.TINY, make.TINY),
        models[0]: (None, make.TINY),
    }
    assert client.models.retrieve("prod").model_extra == listed["prod"]
    refused(http.delete(f"/v1/models/{models[0]}"), 400, "model_in_use", "the alias 'prod' stands for")
    refused(http.delete("/v1/models/prod"), 400, "model_not_deletable", "DELETE /v1/model_aliases/prod", "model")

    assert http.delete("/v1/model_aliases/prod").json()["deleted"] is True
    assert client.models.delete(models[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("prod")


def test_a_rollback_to_a_deleted_model_says_what_to_do(http: httpx.Client, client: OpenAI, models: list[str]) -> None:
    post(http, name="prod", model=models[0])
    post(http, "/prod", model=models[1])
    client.models.delete(models[0])

    refused(http.post("/v1/model_aliases/prod/rollback"), 400, "model_not_found", f"was {models[0]}, which is gone; POST")
    assert http.get("/v1/model_aliases/prod").json()["model"] == models[1]


def test_an_alias_made_again_has_its_old_history_and_no_way_back_into_it(http: httpx.Client, models: list[str]) -> None:
    post(http, name="prod", model=models[0])
    http.delete("/v1/model_aliases/prod")
    assert http.get("/v1/model_aliases/prod").status_code == 404
    again = post(http, name="prod", model=models[1])

    assert (again["version"], again["previous_version"]) == (2, None)
    assert history(http) == [("created", 1, models[0]), ("deleted", 1, models[0]), ("created", 2, models[1])]


@pytest.mark.parametrize("statement", ["UPDATE model_alias_changes SET model = 'x'", "DELETE FROM model_alias_changes"])
def test_nobody_rewrites_the_history(
    http: httpx.Client, models: list[str], api_sessions: Sessions, system_sessions: Sessions, organization: Caller, statement: str
) -> None:
    post(http, name="prod", model=models[0])
    for sessions in (api_sessions, system_sessions):
        with pytest.raises(ProgrammingError, match="permission denied"), sessions.begin() as session:
            db.use_organization(session, organization.organization_id)
            session.execute(text(statement))


def test_moves_at_the_same_time_take_turns(http: httpx.Client, models: list[str]) -> None:
    """Each is a version of its own, and the last one is where the alias stands."""
    with ThreadPoolExecutor(4) as threads:
        for answer in threads.map(lambda n: http.post("/v1/model_aliases", json={"name": "prod", "model": models[0]}), range(4)):
            assert answer.status_code == 200, answer.text
        list(threads.map(lambda n: post(http, "/prod", model=models[n % 3]), range(12)))
    versions = [version for _, version, _ in history(http)]

    assert versions == list(range(1, len(versions) + 1)) and len(versions) > 2
    assert http.get("/v1/model_aliases/prod").json()["model"] == history(http)[-1][2]
