"""One stack for every test of this folder, and a real browser. `make test-browser` runs them: plain `make test` does not."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.chromium import launched
from tests.stack import Stack, running_stack

PATIENCE_MILLISECONDS = 60_000
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

Session = dict[str, object]  # cookies and all else that a browser keeps of a sign-in

expect.set_options(timeout=PATIENCE_MILLISECONDS)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("up"), bases_dir) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=stack.base_url, api_key=stack.api_key) as made:
        yield made


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with launched() as running:
        yield running


@pytest.fixture(scope="session")
def signed_in(stack: Stack, browser: Browser) -> Session:
    """By the link that `tunesmith up` has printed."""
    printed = re.search(r"dashboard +(http\S+)", (stack.data_dir / "console").read_text())
    assert printed is not None
    return signed_in_by(browser, printed[1])


def signed_in_by(browser: Browser, link: str) -> Session:
    context = browser.new_context()
    page = context.new_page()
    page.goto(link)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    state = dict(context.storage_state())
    context.close()
    return state


Opening = Callable[..., Page]


@pytest.fixture
def open_page(stack: Stack, browser: Browser, signed_in: Session) -> Iterator[Opening]:
    """Opens pages in a browser that is signed in, and fails the test for whatever a page complains of."""
    contexts, complaints = list[BrowserContext](), list[str]()

    def open_one(
        path: str,
        *,
        size: dict[str, int] = DESK,
        bypass_csp: bool = False,
        session: Session = signed_in,
        origin: str = stack.base_url.removesuffix("/v1"),
    ) -> Page:
        context = browser.new_context(
            base_url=origin,
            storage_state=session,
            viewport=size,
            bypass_csp=bypass_csp,  # type: ignore[arg-type]
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MILLISECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
        page.on("console", lambda said: complaints.append(f"{page.url}: {said.text}") if _complains(said.text) else None)
        page.goto(path)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


def _complains(text: str) -> bool:
    """A policy that was broken is told on the console alone."""
    return "Content Security Policy" in text or "Uncaught" in text
