"""Who gets in, who does not, and what another site's page can do to somebody who is in: nothing."""

import httpx
import pytest
from sqlalchemy import func, select, update

from app import db
from app.accounts import users
from app.accounts.caller import Caller
from app.core.errors import BadRequest
from app.core.settings import Settings
from app.models import SignIn, User
from tests.conftest import make_organization
from tests.dashboard.conftest import Open, Page, Sessions, link_of
from tests.embedded.patience import PATIENCE_SECONDS

PASSWORD = "correct horse battery"


@pytest.fixture
def email(system_sessions: Sessions, organization: Caller) -> str:
    """Of a user with PASSWORD."""
    with system_sessions.begin() as session:
        owner = {"organization_id": organization.organization_id, "project_id": organization.project_id}
        user = users.create(session, **owner, email=f"{organization.project_id}@Example.org", name="Ada")
        session.flush()
        users.set_password(session, user, PASSWORD)
        return user.email


def is_in(page: Page) -> bool:
    return page.get("/").url.path == "/"


def test_whoever_is_not_signed_in_is_sent_to_the_form_and_comes_back(open_page: Open, email: str) -> None:
    page = open_page()
    asked = page.get("/jobs?after=a")
    assert (asked.url.path, asked.url.params["next"]) == ("/sign-in", "/jobs?after=a")

    came = page.submit("/sign-in", email=email.upper(), password=PASSWORD, next="/jobs?after=a")

    assert (came.status_code, came.url.path, came.url.query) == (200, "/jobs", b"after=a")


@pytest.mark.parametrize("next", ["https://evil.example/", "//evil.example/", "/\\evil.example", "javascript:alert(1)"])
def test_signing_in_leads_nowhere_else(open_page: Open, email: str, next: str) -> None:
    assert open_page().submit("/sign-in", email=email, password=PASSWORD, next=next).url.path == "/"


def test_a_link_works_once_and_looking_at_it_does_not_use_it(
    open_page: Open, system_sessions: Sessions, settings: Settings, organization: Caller
) -> None:
    link = link_of(system_sessions, settings, organization, name="Grace")
    first, second = open_page(), open_page()

    assert "Grace" in first.get(link).text and "Grace" in second.get(link).text
    assert first.submit(link).url.path == "/" and is_in(first)
    refused = second.submit(link)
    assert refused.status_code == 404 and "was used or is too old" in refused.text
    assert second.get(link).status_code == 404 and not is_in(second)


def test_a_wrong_password_is_told_and_says_nothing_about_who_exists(open_page: Open, email: str) -> None:
    page = open_page()
    known, unknown = (page.submit("/sign-in", email=who, password="wrong") for who in (email, "nobody@example.org"))

    assert known.status_code == unknown.status_code == 401
    assert all("e-mail address or password is wrong" in answer.text for answer in (known, unknown))
    assert not is_in(page)


def test_after_many_wrong_passwords_the_right_one_has_to_wait(open_page: Open, email: str, system_sessions: Sessions) -> None:
    page = open_page()
    for _ in range(users.FREE_FAILURES + 2):
        page.submit("/sign-in", email=email, password="wrong")
    with system_sessions.begin() as session:  # else the pause may be over before the right one is typed
        many = {"failures": users.FREE_FAILURES + 9, "not_before": func.clock_timestamp()}
        session.execute(update(User).where(User.email == email).values(many))
    page.submit("/sign-in", email=email, password="wrong")
    refused = page.submit("/sign-in", email=email, password=PASSWORD)
    assert refused.status_code == 429 and "too many wrong passwords" in refused.text

    with system_sessions.begin() as session:
        session.execute(update(User).where(User.email == email).values(not_before=func.clock_timestamp()))
    assert page.submit("/sign-in", email=email, password=PASSWORD).url.path == "/"


def test_signing_out_ends_it_on_the_server(page: Page, open_page: Open) -> None:
    stolen = open_page()
    stolen.http.cookies.update(page.http.cookies)
    assert is_in(stolen)

    assert page.submit("/sign-out").url.path == "/sign-in"

    assert not is_in(stolen)


def test_a_new_password_signs_every_browser_out(open_page: Open, email: str, system_sessions: Sessions) -> None:
    page = open_page()
    page.submit("/sign-in", email=email, password=PASSWORD)
    with system_sessions.begin() as session:
        users.set_password(session, session.scalars(select(User).where(User.email == email)).one(), "another long password")
    assert not is_in(page)
    assert page.submit("/sign-in", email=email, password=PASSWORD).status_code == 401


def test_a_password_has_a_length(system_sessions: Sessions, email: str) -> None:
    with system_sessions() as session:
        user = session.scalars(select(User).where(User.email == email)).one()
        for wrong in ("short", "x" * 1000):
            with pytest.raises(BadRequest, match="has 10 to 256 characters"):
                users.set_password(session, user, wrong)


def test_a_disabled_user_is_out_at_once(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        mine = User.organization_id == organization.organization_id
        session.execute(update(User).where(mine).values(disabled_at=func.clock_timestamp()))
    assert not is_in(page)


def test_a_sign_in_ends_by_itself(page: Page, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        mine = SignIn.organization_id == organization.organization_id
        session.execute(update(SignIn).where(mine).values(expires_at=func.clock_timestamp()))
    assert not is_in(page)

    with system_sessions.begin() as session:
        assert users.forget_old(session) >= 1
        assert session.scalars(select(SignIn).where(mine)).all() == []


def test_the_cookie_is_for_this_server_alone(
    open_page: Open, system_sessions: Sessions, settings: Settings, organization: Caller
) -> None:
    page = open_page()
    page.http.follow_redirects = False
    told = page.submit(link_of(system_sessions, settings, organization)).headers["set-cookie"]

    assert told.startswith("tunesmith=") and "HttpOnly" in told and "SameSite=lax" in told and "Domain" not in told


@pytest.mark.parametrize("headers", [{}, {"origin": "https://evil.example"}, {"origin": "null"}])
def test_no_other_site_signs_anybody_in_or_out(page: Page, email: str, headers: dict[str, str]) -> None:
    for path, fields in (("/sign-in", {"email": email, "password": PASSWORD}), ("/sign-out", {})):
        refused = page.http.post(path, data=fields, headers=headers)
        assert refused.status_code == 403, path
    assert is_in(page)


def test_no_other_site_changes_anything(page: Page) -> None:
    token = page.ask("GET", "/keys").request.headers["x-csrf-token"]
    wrong = ({"origin": "https://evil.example", "x-csrf-token": token}, {"origin": page.url}, {"x-csrf-token": token})
    for headers in wrong:
        for path in ("/keys", "/v1/fine_tuning/jobs"):
            refused = page.http.post(path, data={"name": "theirs"}, headers=headers)
            assert refused.status_code == 403, (path, headers)
    assert "theirs" not in page.get("/keys").text


def test_the_api_takes_the_cookie_where_a_page_of_ours_asks(page: Page, strange_page: Page) -> None:
    made = page.ask("POST", "/v1/webhook_endpoints", json={"url": "https://example.org/"})
    assert made.status_code == 200, made.text
    endpoint = made.json()["id"]

    assert page.http.get(f"/v1/webhook_endpoints/{endpoint}").status_code == 200
    assert strange_page.http.get(f"/v1/webhook_endpoints/{endpoint}").status_code == 404


def test_a_cookie_that_is_signed_out_is_told_by_the_api(page: Page, api_url: str) -> None:
    cookies = dict(page.http.cookies)
    page.submit("/sign-out")
    answer = httpx.get(f"{api_url}/v1/models", cookies=cookies, verify=False, timeout=PATIENCE_SECONDS)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "signed_out")


def test_a_key_wins_over_a_cookie(page: Page, api_url: str) -> None:
    headers = {"authorization": "Bearer ts-wrong"}
    assert page.http.get("/v1/models", headers=headers).status_code == 401


def test_nobody_reads_the_users_of_another_organization(
    api_sessions: Sessions, system_sessions: Sessions, email: str, organization: Caller
) -> None:
    stranger = make_organization(system_sessions)
    for who, count in ((organization.organization_id, 1), (stranger.organization_id, 0)):
        with db.organization_session(api_sessions, who) as session:
            assert len(session.scalars(select(User)).all()) == count
