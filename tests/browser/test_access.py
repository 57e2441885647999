"""Every page with axe, on a desk and on a phone, light and dark: no serious finding; and by keyboard."""

import re
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from playwright.sync_api import expect

from tests import make
from tests.browser import seeding
from tests.browser.conftest import DESK, PHONE, Opening

AXE = Path(__file__).parents[2] / "app/dashboard/web/node_modules/axe-core/axe.min.js"
PAGES = (*seeding.PAGES, "/service")


@pytest.fixture(scope="module")
def paths(client: OpenAI) -> list[str]:
    file = client.files.create(file=("train.jsonl", make.chat_file(8)), purpose="fine-tune")
    asked = [{"n_epochs": 1}, {"n_epochs": 2}]
    one, other = (
        client.fine_tuning.jobs.create(model=make.TINY, training_file=file.id, hyperparameters=parameters).id
        for parameters in asked
    )
    held_back = client.files.create(file=("looked-at.jsonl", make.chat_file(2)), purpose="evals")
    grader = {"type": "multiple_choice", "name": "letter"}
    asked_for = {"file": held_back.id, "models": [make.TINY], "graders": [grader], "sampling": {"max_tokens": 2}}
    evaluation = client.post("/evaluations", cast_to=httpx.Response, body=asked_for).json()["id"]
    hook = {"url": "http://127.0.0.1:9/hook"}
    endpoint = client.post("/webhook_endpoints", cast_to=httpx.Response, body=hook).json()["id"]
    of_one = f"/files/{file.id}", f"/files/{held_back.id}", f"/jobs/{one}", f"/evaluations/{evaluation}", f"/webhooks/{endpoint}"
    return [*PAGES, *of_one, f"/jobs/compare?ids={one}&ids={other}"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_no_page_has_a_serious_finding(open_page: Opening, paths: list[str], size: dict[str, int], theme: str) -> None:
    page = open_page("/keys", size=size, bypass_csp=True)
    page.evaluate("theme => localStorage.setItem('theme', theme)", theme)
    found = {}
    for path in paths:
        page.goto(path)
        page.add_script_tag(path=AXE)
        result = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']})")
        serious = [one for one in result["violations"] if one["impact"] in ("serious", "critical")]
        found[path] = [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in serious]
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path} is {wide} pixels wider than its screen"
    assert {path: findings for path, findings in found.items() if findings} == {}


def test_the_rooms_are_reached_by_keyboard(open_page: Opening) -> None:
    page = open_page("/")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.get_by_role("link", name="Jobs", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/jobs$"))


def test_a_phone_opens_the_rooms_from_a_menu(open_page: Opening) -> None:
    page = open_page("/", size=PHONE)
    link = page.get_by_role("link", name="Models", exact=True)
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Menu").click()
    link.click()
    expect(page).to_have_url(re.compile(r"/models$"))


def test_the_theme_that_was_chosen_is_kept(open_page: Opening) -> None:
    page = open_page("/")
    page.get_by_role("button", name="Light or dark").click()
    chosen = page.locator("html").get_attribute("data-theme")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == chosen
