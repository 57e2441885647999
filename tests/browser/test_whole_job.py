"""The whole job by somebody who never reads the API: a file, a job that is watched, a model that answers."""

import re
from pathlib import Path

import pytest
from openai import OpenAI
from playwright.sync_api import Page, expect

from tests import make
from tests.browser.conftest import PHONE, Opening
from tests.stack import Stack

pytestmark = pytest.mark.timeout(300)


def upload(page: Page, folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    page.goto("/files")
    page.locator("#chosen").set_input_files(path)


def begin(client: OpenAI, *, epochs: int = 40) -> str:
    """A job that is under way for a while, by its id."""
    file = client.files.create(file=("train.jsonl", make.chat_file(64)), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(
        model=make.TINY,
        training_file=file.id,
        hyperparameters={"n_epochs": epochs, "batch_size": 4},
        extra_body={"training": {"checkpoint_every_steps": 64}},
    )
    return made.id


def step_of(page: Page) -> int:
    found = re.search(r"step ([\d,]+) of", page.locator("#job-state").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def wait_for_steps(page: Page, more_than: int) -> int:
    page.wait_for_function(
        "least => Number((/step ([\\d,]+) of/.exec(document.getElementById('job-state').innerText) ?? ['', '0'])[1]"
        ".replace(',', '')) > least",
        arg=more_than,
    )
    return step_of(page)


def test_from_a_file_to_a_model_that_answers(open_page: Opening, tmp_path: Path) -> None:
    page = open_page("/")
    upload(page, tmp_path, "numbers.jsonl", make.chat_file(48))
    row = page.get_by_role("row", name=re.compile("numbers.jsonl"))
    expect(row.get_by_text("valid", exact=True)).to_be_visible()
    page.get_by_role("link", name="numbers.jsonl").click()
    page.get_by_role("button", name="Look").click()
    expect(page.locator("#look mark").first).to_be_visible()

    page.get_by_role("link", name="Train on it").click()
    page.get_by_label("Epochs").fill("3")
    page.get_by_label("Name").fill("counting")
    expect(page.locator("#plan").get_by_text("What auto becomes")).to_be_visible()
    page.get_by_role("button", name="Start the job").click()

    expect(page.get_by_role("heading", name="counting")).to_be_visible()
    expect(page.locator("#job-state .badge")).to_have_text("succeeded")
    expect(page.locator("#loss canvas")).to_be_visible()
    expect(page.locator("#log")).to_contain_text("successfully completed")
    expect(page.get_by_role("link", name="Try it beside its base")).to_be_visible()
    expect(page.get_by_role("region", name="Checkpoints").get_by_text(":ckpt-step-").first).to_be_visible()
    expect(page.locator("#examples .excerpt").first).to_contain_text("What comes after")
    page.get_by_text("Manifest: what it was made of").click()
    expect(page.locator("#outcome details .excerpt")).to_contain_text("dataset_sha256")

    page.goto("/models")
    model = page.get_by_role("row", name=re.compile("counting"))
    model.get_by_role("link", name="Try").click()
    expect(page.locator(".column")).to_have_count(2)
    page.get_by_label("Message", exact=True).fill("What comes after 3?")
    page.get_by_label("Message", exact=True).press("Enter")
    for column in page.locator(".column").all():
        expect(column.locator(".turn.assistant")).not_to_be_empty()
        expect(column.locator(".speed")).to_contain_text("first token after")


def test_a_file_with_problems_shows_its_lines(open_page: Opening, tmp_path: Path) -> None:
    page = open_page("/")
    broken = make.chat_file(3) + b'\n{"messages": "<img src=x onerror=alert(1)>"}'
    upload(page, tmp_path, "broken.jsonl", broken)
    expect(page.get_by_role("row", name=re.compile("broken.jsonl")).get_by_text("invalid")).to_be_visible()
    page.get_by_role("link", name="broken.jsonl").click()
    expect(page.locator(".findings")).to_contain_text("line 4")
    expect(page.locator(".excerpt").last).to_have_text('{"messages": "<img src=x onerror=alert(1)>"}')


def test_jobs_are_chosen_in_the_list_and_compared(open_page: Opening, client: OpenAI) -> None:
    chosen = [begin(client, epochs=epochs) for epochs in (1, 2)]
    page = open_page("/jobs")
    expect(page.get_by_role("button", name="Compare")).to_be_hidden()
    for job in chosen:
        page.locator(f'input[value="{job}"]').check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="2 jobs compared")).to_be_visible()
    expect(page.locator("#validation canvas")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("hyperparameters.n_epochs"))).to_be_visible()


def test_two_tabs_follow_one_job_that_is_paused_resumed_and_cancelled(open_page: Opening, client: OpenAI) -> None:
    job = begin(client, epochs=100)
    acting, watching = open_page(f"/jobs/{job}"), open_page(f"/jobs/{job}", size=PHONE)
    wait_for_steps(watching, 8)
    acting.get_by_role("button", name="Pause").click()
    for page in (acting, watching):
        expect(page.locator("#job-state .badge")).to_have_text("paused")
    acting.get_by_role("button", name="Resume").click()
    expect(watching.locator("#job-state .badge")).to_have_text("running")
    acting.on("dialog", lambda dialog: dialog.accept())
    acting.get_by_role("button", name="Cancel").click()
    for page in (acting, watching):
        expect(page.locator("#job-state .badge")).to_have_text("cancelled")


def test_a_page_goes_on_after_lost_connections_and_a_restart_of_the_api(open_page: Opening, stack: Stack, client: OpenAI) -> None:
    job = begin(client, epochs=100)
    page = open_page(f"/jobs/{job}")
    seen = wait_for_steps(page, 4)
    page.context.set_offline(True)
    page.wait_for_timeout(1500)
    page.context.set_offline(False)
    seen = wait_for_steps(page, seen)
    (api,) = stack.children("uvicorn")
    api.kill()
    wait_for_steps(page, seen)
    client.with_options(max_retries=8).fine_tuning.jobs.cancel(job)
    expect(page.locator("#job-state .badge")).to_have_text("cancelled")
    told = page.locator("#log li").all_inner_texts()
    assert len(told) == len(set(told))


def test_a_closed_tab_changes_nothing(open_page: Opening, client: OpenAI) -> None:
    job = begin(client, epochs=4)
    open_page(f"/jobs/{job}").context.close()
    page = open_page(f"/jobs/{job}")
    expect(page.locator("#job-state .badge")).to_have_text("succeeded")


def test_an_operator_sees_who_works(open_page: Opening) -> None:
    page = open_page("/service")
    expect(page.get_by_role("region", name="Engines")).to_contain_text(make.TINY)
    expect(page.get_by_role("region", name="Relays and workers")).to_contain_text("train.cpu")
    expect(page.get_by_role("alert")).to_have_count(0)
