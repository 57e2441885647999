"""The form that makes an evaluation, as a browser fills it in."""

import json
import re

import pytest

from app.accounts.caller import Caller
from app.core.engine import Heartbeat
from app.core.storage import Storage
from app.inference import engines
from app.models import Evaluation
from tests import make
from tests.browser import seeding
from tests.dashboard.conftest import Page, Sessions

ITEM = json.dumps({"item": {"city": "Paris", "country": "France"}})
QUESTION = json.dumps({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})


def evaluated(session: Sessions, organization: Caller, storage: Storage, content: str) -> str:
    with session.begin() as opened:
        return seeding.uploaded(opened, organization, storage, "rows.jsonl", content, purpose="evals").id


def grader(page: Page, kind: str, **fields: str) -> dict[str, str]:
    """The fields of one more grader, as the form would send them."""
    part = page.get(f"/evaluations/new/grader?kind={kind}").text
    key = re.search(r'name="(grader\.\w+)\.type"', part)
    assert key is not None
    written = dict(re.findall(r'name="grader\.\w+\.(\w+)"[^>]* value="([^"]*)"', part))
    written |= dict(re.findall(r'<textarea [^>]*name="grader\.\w+\.(\w+)"[^>]*>([^<]*)<', part))
    sent = {"type": kind, **written, **fields}
    for name in sent:
        assert f'name="{key[1]}.{name}"' in part, name
    return {f"{key[1]}.{name}": value for name, value in sent.items()}


@pytest.fixture
def served(system_sessions: Sessions) -> str:
    """The tiny base, which an engine says that it answers for."""
    beat = Heartbeat(engine_id="engine-new", url="http://x", base=make.TINY, base_digest="d", running=0, waiting=0)
    with system_sessions.begin() as session:
        engines.record(session, beat)
    return make.TINY


def test_the_form_offers_what_can_be_asked(page: Page, system_sessions: Sessions, organization: Caller, served: str) -> None:
    with system_sessions.begin() as session:
        tuned = make.tuned_model(session, organization)
    told = page.get(f"/evaluations/new?model={served}&model={tuned}").text
    assert f"<option selected>{served}</option>" in told
    assert re.search(rf'value="{re.escape(tuned)}" checked', told)
    assert "checked" not in page.get("/evaluations/new?model=nobody").text


@pytest.mark.parametrize(
    ("content", "told", "asks"),
    [
        (make.chat_line("Hello", "Hi"), ["{{item.reference}}", "{{item.messages}}"], False),
        (QUESTION, ["{{item.choices}}", "with a letter"], False),
        (ITEM, ["{{item.city}}", "{{item.country}}"], True),
    ],
    ids=["chats", "multiple choice", "items"],
)
def test_rows_say_what_graders_find_in_them(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage, content: str, told: list[str], asks: bool
) -> None:
    file = evaluated(system_sessions, organization, storage, content)
    part = page.get(f"/evaluations/new/rows?file={file}").text
    assert all(words in part for words in told)
    assert ('name="question"' in part) is asks


def test_an_evaluation_is_what_the_form_said(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage, served: str
) -> None:
    file = evaluated(system_sessions, organization, storage, "\n".join([ITEM, ITEM]))
    with system_sessions.begin() as session:
        tuned = make.tuned_model(session, organization)
    form = {
        "name": "capitals",
        "file": file,
        "first": served,
        "models": tuned,
        "question": "What is the capital of {{item.country}}?",
        "system": "Be brief.",
        "judge": served,
        "criteria": "Which is right?",
        "temperature": "0.5",
        "max_tokens": "12",
        "seed": "3",
    }
    form |= grader(page, "string_check", reference="{{item.city}}", operation="ilike")
    form |= grader(page, "text_similarity", metric="bleu", reference="{{item.city}}")
    form |= grader(page, "json_schema", schema='{"type": "string"}')
    form |= grader(page, "regex", name="starts", pattern="^P", ignore_case="on")
    form |= grader(page, "multiple_choice", reference="{{item.city}}")
    form |= grader(page, "score_model", name="judged", judge=served, lowest="1", highest="5")
    planned = page.ask("POST", "/evaluations/new/plan", data=form)
    assert 'role="alert"' not in planned.text, planned.text
    assert '<dd class="numbers">4</dd>' in planned.text  # two rows, two models

    made = page.ask("POST", "/evaluations/new", data=form)
    path = made.headers["hx-redirect"]
    assert page.get(path).status_code == 200
    with system_sessions.begin() as session:
        request = session.get_one(Evaluation, path.rpartition("/")[2]).request
    assert request["models"] == [served, tuned]
    assert [message["content"] for message in request["input"]] == ["Be brief.", "What is the capital of {{item.country}}?"]
    assert request["pairwise"] == {"judge": served, "criteria": "Which is right?"}
    assert (request["sampling"]["temperature"], request["sampling"]["max_tokens"], request["sampling"]["seed"]) == (0.5, 12, 3)
    exact, likeness, shape, starts, letter, judged = request["graders"]
    assert (exact["name"], exact["operation"], exact["reference"]) == ("exact", "ilike", "{{item.city}}")
    assert (likeness["evaluation_metric"], shape["json_schema"]) == ("bleu", {"type": "string"})
    assert (starts["pattern"], starts["full"], starts["ignore_case"]) == ("^P", False, True)
    assert (letter["type"], judged["range"], judged["model"]) == ("multiple_choice", [1, 5], served)
    assert "{{sample.output_text}}" in judged["input"][0]["content"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"file": ""}, "Choose a file and add a grader"),
        ({"first": "nobody"}, "nobody"),
        ({"grader.a.type": "regex", "grader.a.pattern": "("}, "regular expression"),
        ({"grader.a.type": "json_schema", "grader.a.schema": "{"}, "graders.0.json_schema must be JSON"),
        ({"grader.a.type": "score_model", "grader.a.instructions": "?", "grader.a.judge": "x"}, "x"),
        ({"grader.a.type": "string_check", "grader.a.reference": "{{row.x}}"}, "placeholders"),
        ({"temperature": "warm"}, "sampling.temperature must be a number"),
        ({"max_tokens": "0"}, "sampling.max_tokens"),
        ({"question": "?"}, "remove input"),
        ({"judge": "x"}, "at least two"),
        ({"grader.a.type": ""}, "add a grader"),
    ],
)
def test_what_is_wrong_is_told_where_the_plan_is(
    page: Page, system_sessions: Sessions, organization: Caller, storage: Storage, changed: dict[str, str], why: str
) -> None:
    file = evaluated(system_sessions, organization, storage, make.chat_line("Hello", "Hi"))
    form = {"file": file, "first": make.TINY, "grader.a.type": "string_check"} | changed
    form = {name: text for name, text in form.items() if text}
    told = page.ask("POST", "/evaluations/new/plan", data=form)
    assert told.status_code == 200 and why in told.text.replace("&#39;", "'"), told.text
    refused = page.ask("POST", "/evaluations/new", data=form)
    assert refused.status_code in (400, 404) and "hx-redirect" not in refused.headers


def test_strangers_files_and_unknown_graders_are_not_found(
    page: Page, strange_page: Page, system_sessions: Sessions, organization: Caller, storage: Storage
) -> None:
    file = evaluated(system_sessions, organization, storage, ITEM)
    assert strange_page.get(f"/evaluations/new/rows?file={file}").status_code == 404
    assert "Paris" in page.get(f"/evaluations/new/rows?file={file}").text
    assert page.get("/evaluations/new/grader?kind=python").status_code == 404
