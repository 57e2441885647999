"""Organizations and people, let in by whoever runs the service."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.core import ids
from app.core.settings import Settings
from tests.cli.conftest import Tunesmith
from tests.dashboard.conftest import Page
from worker.embedded import environment


@pytest.fixture(autouse=True)
def configured(settings: Settings, api_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a deployment, where variables name the database and its secrets."""
    for name, value in environment.of(settings, secrets=environment.PRIVATE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNESMITH_DASHBOARD__URL", api_url)


@pytest.fixture
def slug() -> str:
    return ids.new("o")[:20].replace("_", "-")


@contextmanager
def browsing(api_url: str) -> Iterator[Page]:
    page = Page(api_url)
    with page.http:
        yield page


@contextmanager
def signed_in(link: str, api_url: str) -> Iterator[Page]:
    with browsing(api_url) as browser:
        browser.submit(link).raise_for_status()
        yield browser


def test_a_user_of_a_new_organization_is_let_in_and_given_a_new_link(tunesmith: Tunesmith, api_url: str, slug: str) -> None:
    made = tunesmith("organizations", "add", "Acme & Sons", "--slug", slug)
    assert (made.status, made.err) == (0, "") and slug in made.out
    email = f"Ada@{slug}.example"
    added = json.loads(tunesmith("users", "add", email, "--organization", slug, "--name", "Ada", "--json").out)
    with signed_in(added["link"], api_url) as browser:
        told = browser.get("/account").text
        assert email.lower() in told and "Ada" in told and browser.get("/service").status_code == 404

    again = json.loads(tunesmith("sign-in", "--email", email, "--json").out)["link"]
    with signed_in(again, api_url) as browser:
        assert email.lower() in browser.get("/account").text

    organizations = {one["slug"]: one for one in json.loads(tunesmith("organizations", "list", "--json").out)}
    assert (organizations[slug]["name"], organizations[slug]["users"]) == ("Acme & Sons", 1)
    users = {one["email"]: one for one in json.loads(tunesmith("users", "list", "--json").out)}
    assert (users[email.lower()]["organization"], users[email.lower()]["is_operator"]) == (slug, False)
    assert email.lower() in tunesmith("users", "list").out and slug in tunesmith("organizations", "list").out


def test_whoever_is_disabled_is_out_at_once_and_comes_in_again(tunesmith: Tunesmith, api_url: str, slug: str) -> None:
    email = f"eve@{slug}.example"
    assert tunesmith("organizations", "add", "Acme", "--slug", slug).status == 0
    link, unused = (
        json.loads(tunesmith(*asked, "--json").out)["link"]
        for asked in (("users", "add", email, "--organization", slug), ("sign-in", "--email", email))
    )
    with signed_in(link, api_url) as browser:
        browser.ask("POST", "/account/password", data={"password": "correct horse"}).raise_for_status()
        assert browser.get("/account").url.path == "/account"
        assert json.loads(tunesmith("users", "disable", email.upper(), "--json").out) == {"email": email, "is_disabled": True}
        assert browser.get("/account").url.path == "/sign-in"
        assert browser.submit(unused).status_code == 404
    refused = tunesmith("sign-in", "--email", email)
    assert (refused.status, refused.out) == (1, "") and "users enable" in refused.err
    assert "disabled" in next(line for line in tunesmith("users", "list").out.splitlines() if email in line)

    assert tunesmith("users", "enable", email).status == 0
    with browsing(api_url) as browser:
        signed = browser.submit("/sign-in", email=email, password="correct horse")
        assert signed.url.path == "/" and email in browser.get("/account").text
    again = json.loads(tunesmith("sign-in", "--email", email, "--json").out)["link"]
    with signed_in(again, api_url) as browser:
        assert email in browser.get("/account").text


def test_the_operator_is_not_shut_out(tunesmith: Tunesmith) -> None:
    assert tunesmith("sign-in").status == 0  # who makes the operator, where there is none
    operator = next(one["email"] for one in json.loads(tunesmith("users", "list", "--json").out) if one["is_operator"])
    refused = tunesmith("users", "disable", operator)
    assert (refused.status, refused.out) == (1, "") and "is not shut out" in refused.err
    assert tunesmith("sign-in").status == 0


def test_what_cannot_be_is_told_in_a_line(tunesmith: Tunesmith, slug: str) -> None:
    assert tunesmith("organizations", "add", "One", "--slug", slug).status == 0
    assert tunesmith("users", "add", f"a@{slug}.example", "--organization", slug).status == 0
    for arguments, why in (
        (("organizations", "add", "Two", "--slug", slug), "already"),
        (("organizations", "add", "Two", "--slug", "Two!"), "a to z"),
        (("users", "add", f"A@{slug}.example", "--organization", slug), "is a user already"),
        (("users", "add", "nobody", "--organization", slug), "is not an e-mail address"),
        (("users", "add", f"b@{slug}.example", "--organization", "nowhere"), "organizations list"),
        (("sign-in", "--email", "nobody@nowhere.example"), "users list"),
        (("users", "disable", "nobody@nowhere.example"), "users list"),
    ):
        said = tunesmith(*arguments)
        assert (said.status, said.out, said.err.count("\n")) == (1, "", 1), said
        assert why in said.err
