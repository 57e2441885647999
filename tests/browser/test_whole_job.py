"""The whole job by somebody who never reads the API: a file, a job that is watched, a model that answers."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import OpenAI
from playwright.sync_api import Page, expect

from bench.chaos.proxy import Proxy, serving
from tests import make
from tests.browser.conftest import PHONE, Opening
from tests.stack import Stack

PART_BYTES = 16 * 1024 * 1024  # of what the browser sends

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
    page.get_by_label("Learning rate").fill("fast")
    expect(page.locator("#plan")).to_contain_text("Learning rate must be")
    expect(page.get_by_label("Learning rate")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Learning rate").fill("")
    page.get_by_label("Name").fill("counting")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    expect(page.locator("#plan").get_by_text("What auto becomes")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Name")).to_have_value("counting")
    page.get_by_role("button", name="Hold back 10 %").click()
    expect(page.get_by_label("Or hold back")).to_have_value("0.1")
    page.get_by_role("button", name="Start the job").click()

    expect(page.get_by_role("heading", name="counting")).to_be_visible()
    expect(page.locator("#job-state .badge")).to_have_text("succeeded")
    expect(page.locator("#loss canvas")).to_be_visible()
    expect(page.locator("#log")).to_contain_text("successfully completed")
    curve = page.locator("#loss canvas")
    rough = curve.screenshot()
    page.get_by_label("Smoothing").fill("5")
    expect(page.locator("#job output")).to_have_text("5 % of the steps")
    page.wait_for_timeout(200)
    assert curve.screenshot() != rough
    page.reload()
    expect(page.locator("#job output")).to_have_text("5 % of the steps")
    expect(page.get_by_role("link", name="Try it beside its base")).to_be_visible()
    expect(page.get_by_role("region", name="Checkpoints").get_by_text(":ckpt-step-").first).to_be_visible()
    expect(page.locator("#examples .excerpt").first).to_contain_text("What comes after")
    page.get_by_text("Manifest: what it was made of").click()
    expect(page.locator("#outcome .excerpt", has_text="dataset_sha256")).to_be_visible()
    page.get_by_role("region", name="Checkpoints").get_by_role("link", name="Try").first.click()
    expect(page.locator("select.model option:checked")).to_contain_text("step")  # which the list of models leaves out

    page.goto("/jobs/new")
    expect(page.get_by_label("Name")).to_have_value("")  # what was sent is no draft any more
    page.goto("/models")
    page.get_by_role("link", name=re.compile("^counting")).click()
    expect(page.get_by_role("heading", name=re.compile("^counting"))).to_be_visible()
    expect(page.locator("pre", has_text="chat/completions")).to_contain_text(":counting:")
    page.get_by_text("Manifest: what it was made of").click()
    expect(page.locator(".excerpt", has_text="dataset_sha256")).to_be_visible()
    page.goto("/models")
    model = page.get_by_role("row", name=re.compile("counting"))
    model.get_by_role("link", name="Try").click()
    expect(page.locator(".column")).to_have_count(2)
    page.get_by_label("Message", exact=True).fill("What comes after 3?")
    page.get_by_label("Message", exact=True).press("Enter")
    for column in page.locator(".column").all():
        expect(column.locator(".turn.assistant")).not_to_be_empty()
        expect(column.locator(".speed")).to_contain_text("first token after")

    expect(page.locator(".turn[aria-busy]")).to_have_count(0)
    page.get_by_label("Message", exact=True).fill("and a half-written one")
    said = page.locator(".turn").all_inner_texts()
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    assert page.locator(".turn").all_inner_texts() == said
    expect(page.get_by_label("Message", exact=True)).to_have_value("and a half-written one")


def test_a_file_with_problems_shows_its_lines(open_page: Opening, tmp_path: Path) -> None:
    page = open_page("/")
    broken = make.chat_file(3) + b'\n{"messages": "<img src=x onerror=alert(1)>"}'
    upload(page, tmp_path, "broken.jsonl", broken)
    expect(page.get_by_role("row", name=re.compile("broken.jsonl")).get_by_text("invalid")).to_be_visible()
    page.get_by_role("link", name="broken.jsonl").click()
    expect(page.locator(".findings")).to_contain_text("line 4")
    expect(page.locator(".findings .excerpt").last).to_have_text('{"messages": "<img src=x onerror=alert(1)>"}')


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


def test_a_stream_that_breaks_off_or_is_refused_is_taken_up_again(open_page: Opening, stack: Stack, client: OpenAI) -> None:
    """By a network that resets connections, and by a proxy that answers 502 while the API is away."""
    job = begin(client, epochs=100)
    api = urlsplit(stack.base_url)
    proxy = Proxy(lambda: api.port or 80)
    with serving(proxy):
        page = open_page("/account", origin=f"http://{api.hostname}:{proxy.port}")
        refusals = [502, 503]
        page.route(
            "**/events?*", lambda route: route.fulfill(status=refusals.pop()) if refusals else route.continue_(), times=None
        )
        page.goto(f"/jobs/{job}")
        expect(page.locator("#job[data-follows]")).to_be_visible()
        assert refusals == []
        seen = wait_for_steps(page, 4)
        for _ in range(2):
            proxy.reset()
            seen = wait_for_steps(page, seen)
        client.fine_tuning.jobs.cancel(job)
        expect(page.locator("#job-state .badge")).to_have_text("cancelled")
        expect(page.locator("#log")).to_contain_text("cancelled")
        told = page.locator("#log li").all_inner_texts()
        assert len(told) == len(set(told))


def test_an_evaluation_is_made_and_read(open_page: Opening, tmp_path: Path) -> None:
    page = open_page("/files")
    page.get_by_label("to", exact=True).select_option("evaluate with")
    held_back = tmp_path / "held-back.jsonl"
    held_back.write_bytes(make.chat_file(3))
    page.locator("#chosen").set_input_files(held_back)
    expect(page.get_by_role("row", name=re.compile("held-back.jsonl")).get_by_text("valid", exact=True)).to_be_visible()
    page.get_by_role("link", name="held-back.jsonl").click()
    page.get_by_role("link", name="Evaluate with it").click()

    expect(page.locator("#rows-of-file")).to_contain_text("{{item.reference}}")
    expect(page.locator("#plan")).to_contain_text("add a grader")
    page.get_by_role("button", name="likeness to the reference").click()
    page.get_by_role("button", name="a pattern").click()
    expect(page.locator("#plan")).to_contain_text("pattern")
    page.get_by_role("button", name="Remove this grader").last.click()
    expect(page.locator("#plan")).to_contain_text("Choose a second model")
    page.get_by_label("Measure").select_option("gleu")
    page.get_by_label("Longest answer").fill("4")
    page.get_by_label("Name", exact=True).last.fill("first look")
    form = page.url
    page.reload()
    expect(page.get_by_label("Measure")).to_have_value("gleu")
    expect(page.get_by_label("Longest answer")).to_have_value("4")
    expect(page.locator("#plan")).to_contain_text("Choose a second model")
    page.get_by_role("button", name="Start the evaluation").click()

    expect(page.get_by_role("heading", name="first look")).to_be_visible()
    expect(page.locator("#evaluation .badge").first).to_have_text("succeeded")
    expect(page.get_by_role("region", name="Scores")).to_contain_text("likeness")
    expect(page.get_by_role("region", name="Answers").locator("tbody tr:not(.asked)")).to_have_count(3)
    expect(page.get_by_role("region", name="Answers")).to_contain_text("to be answered: 1")

    page.goto(form)
    expect(page.locator("#plan")).to_contain_text("add a grader")
    expect(page.locator(".grader")).to_have_count(0)  # what was sent is no draft any more


def test_a_large_file_goes_in_parts_through_a_restart_of_the_api_and_a_reload(
    open_page: Opening, stack: Stack, client: OpenAI, tmp_path: Path
) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        while file.tell() < 3.5 * PART_BYTES:
            file.write(make.chat_file(10_000) + b"\n")
    page = open_page("/files")
    sent = list[str]()
    page.on("response", lambda answer: sent.append(answer.url) if answer.url.endswith("/parts") and answer.ok else None)
    page.locator("#chosen").set_input_files(large)
    page.wait_for_function("() => Number(document.querySelector('#uploads progress')?.value) > 0.3")
    (api,) = stack.children("uvicorn")
    api.kill()
    expect(page.locator("#uploads")).to_contain_text("it goes on by itself")
    page.wait_for_function("() => Object.values(localStorage).some((kept) => kept.includes('part_'))")

    page.on("dialog", lambda dialog: dialog.accept())  # whether to leave
    page.reload()
    expect(page.locator("#uploads li")).to_have_count(0)
    page.locator("#chosen").set_input_files(large)
    row = page.get_by_role("row", name=re.compile("large.jsonl"))
    expect(row.get_by_text("valid", exact=True)).to_be_visible()
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('upload'))") == []
    (file,) = (one for one in client.files.list() if one.filename == "large.jsonl")
    assert file.bytes == large.stat().st_size
    assert len(sent) <= 5, "parts that had arrived were sent again"


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
