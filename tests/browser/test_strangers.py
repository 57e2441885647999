"""What is not ours to show, and what must not be taken for ours: other organizations, and markup in whatever people write."""

import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI
from playwright.sync_api import Browser, Page, expect

from tests import make
from tests.browser.conftest import Opening, Session, signed_in_by
from tests.embedded.patience import eventually
from tests.stack import Stack

pytestmark = pytest.mark.timeout(300)

MARKUP = """"'><script>hit = 1</script><img src=x onerror="hit = 2"><svg onload="hit = 3">&lt;{{ 7 * 7 }}"""


def tunesmith(stack: Stack, *arguments: str) -> str:
    command = [sys.executable, "-m", "cli.main", *arguments, "--data-dir", str(stack.data_dir), "--json"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def stranger(stack: Stack, browser: Browser) -> Session:
    """Somebody of another organization, let in as the documentation says."""
    tunesmith(stack, "organizations", "add", "Acme", "--slug", "acme")
    said = json.loads(tunesmith(stack, "users", "add", "wile@acme.example", "--organization", "acme"))
    return signed_in_by(browser, said["link"])


def finished(client: OpenAI, file_id: str, **asked: object) -> str:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, **asked)  # type: ignore[call-overload]
    eventually(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    return str(job.id)


def test_another_organization_sees_nothing_of_it(open_page: Opening, stranger: Session, client: OpenAI, stack: Stack) -> None:
    file = client.files.create(file=("secret-plans.jsonl", make.chat_file(8)), purpose="fine-tune")
    job = finished(client, file.id, suffix="secret-job", hyperparameters={"n_epochs": 1})
    model = client.fine_tuning.jobs.retrieve(job).fine_tuned_model
    assert model is not None
    ours, theirs = open_page("/keys"), open_page("/keys", session=stranger)
    ours.get_by_label("Name of a new key").fill("the-secret-key")
    ours.get_by_role("button", name="Make a key").click()
    expect(ours.get_by_text("shown this once")).to_be_visible()
    client.post("/webhook_endpoints", cast_to=object, body={"url": "http://127.0.0.1:9/secret-hook", "name": "secret-hook"})

    for path in ("/", "/files", "/jobs", "/jobs/new", "/models", "/evaluations/new", "/keys", "/webhooks"):
        for page, is_ours in ((ours, True), (theirs, False)):
            page.goto(path)
            page.wait_for_timeout(300)  # what a page asks for once it is there
            assert ("secret" in page.content()) is is_ours, (path, is_ours)
    for path in (f"/files/{file.id}", f"/jobs/{job}", f"/jobs/compare?ids={job}&ids=ftjob-none"):
        answer = theirs.goto(path)
        assert answer is not None and answer.status == 404 and "secret" not in theirs.content(), path
    theirs.goto("/playground")
    expect(theirs.locator("select.model")).to_be_visible()
    assert "secret" not in theirs.content()


@pytest.fixture(scope="module")
def hostile(client: OpenAI, stack: Stack) -> Iterator[list[str]]:
    """Markup in everything that may hold it, and the paths of the pages that show it."""
    rows = [json.dumps({"messages": [{"role": "user", "content": MARKUP}, {"role": "assistant", "content": MARKUP}]})] * 8
    content = "\n".join(rows).encode()
    good = client.files.create(file=(MARKUP, content), purpose="fine-tune")
    held_back = client.files.create(file=(MARKUP, "\n".join(rows[:2]).encode()), purpose="evals")
    bad = client.files.create(file=(MARKUP, json.dumps({MARKUP: MARKUP}).encode()), purpose="fine-tune")
    job = finished(client, good.id, hyperparameters={"n_epochs": 1}, metadata={"note": MARKUP})
    other = finished(client, good.id, hyperparameters={"n_epochs": 2})
    model = client.fine_tuning.jobs.retrieve(job).fine_tuned_model
    grader = {
        "type": "string_check",
        "name": MARKUP[:64],
        "operation": "like",
        "input": "{{sample.output_text}}",
        "reference": "<b>",
    }
    asked = {"name": MARKUP[:64], "file": held_back.id, "models": [model], "graders": [grader], "sampling": {"max_tokens": 4}}
    evaluation = client.post("/evaluations", cast_to=httpx.Response, body=asked).json()["id"]
    hook = {"url": "http://127.0.0.1:9/hook?<svg/onload=hit>", "name": MARKUP}
    endpoint = client.post("/webhook_endpoints", cast_to=httpx.Response, body=hook).json()["id"]
    yield [
        *("/", "/files", "/jobs", f"/jobs/new?training_file={good.id}", "/models", "/playground", "/webhooks", "/keys"),
        *("/evaluations", f"/evaluations/new?file={held_back.id}&model={model}", f"/evaluations/{evaluation}"),
        *(f"/files/{file.id}" for file in (good, held_back, bad)),
        *(f"/jobs/{job}", f"/jobs/compare?ids={job}&ids={other}", f"/webhooks/{endpoint}"),
        f"/sign-in?next={MARKUP}",
        f"/{MARKUP}",
    ]


def untouched(page: Page) -> bool:
    """Neither has a script of the markup run nor an element of it come to be."""
    return bool(page.evaluate("typeof hit === 'undefined' && !document.querySelector('img, svg[onload], [onerror], b')"))


def test_markup_in_names_and_rows_stays_text(open_page: Opening, hostile: list[str]) -> None:
    page = open_page("/keys")
    page.get_by_label("Name of a new key").fill(MARKUP)
    page.get_by_role("button", name="Make a key").click()
    expect(page.get_by_role("row", name=MARKUP)).to_be_visible()
    assert untouched(page)
    for path in hostile:
        page.goto(path)
        page.wait_for_timeout(500)  # parts that are asked for, streams, charts
        assert untouched(page), path
        assert "49" not in page.title(), path

    (good,) = (path for path in hostile if path.startswith("/jobs/new"))
    page.goto(f"/files/{good.partition('=')[2]}")
    page.get_by_role("button", name="Look").click()
    expect(page.locator("#look mark").first).to_contain_text("<script>")
    assert untouched(page)


def test_markup_in_a_conversation_stays_text(open_page: Opening) -> None:
    page = open_page("/playground")
    page.get_by_label("Message", exact=True).fill(MARKUP)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator(".turn.user").first).to_have_text(MARKUP)
    expect(page.locator(".turn.assistant").first).not_to_be_empty()
    assert untouched(page)
