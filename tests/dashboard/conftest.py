"""Browsers without a window: cookies, forms, and the headers that a real one sends."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from sqlalchemy import orm

from app.accounts import users
from app.accounts.caller import Caller
from app.core import ids
from app.core.settings import Settings
from tests.conftest import make_organization
from tests.embedded.patience import PATIENCE_SECONDS

Sessions = orm.sessionmaker[orm.Session]
Open = Callable[[], "Page"]


class Page:
    """What one browser does on the dashboard."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, follow_redirects=True, verify=False, timeout=PATIENCE_SECONDS)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def submit(self, path: str, **fields: str) -> httpx.Response:
        """A form without a script: the origin is all that tells whose it is."""
        return self.http.post(path, data=fields, headers={"origin": self.url})

    def ask(self, method: str, path: str, **options: object) -> httpx.Response:
        """What a script of a page asks, with the token of the page."""
        token = re.search(r'name="csrf-token" content="([^"]+)"', self.get("/keys").text)
        assert token is not None
        headers = {"origin": self.url, "x-csrf-token": token[1]}
        return self.http.request(method, path, headers=headers, **options)  # type: ignore[arg-type]


@pytest.fixture
def open_page(api_url: str) -> Iterator[Open]:
    with ExitStack() as opened:

        def open_one() -> Page:
            page = Page(api_url)
            opened.callback(page.http.close)
            return page

        yield open_one


def link_of(sessions: Sessions, settings: Settings, caller: Caller, *, name: str = "Ada", is_operator: bool = False) -> str:
    """A fresh user of this organization, as a link that signs them in."""
    with sessions.begin() as session:
        owner = {"organization_id": caller.organization_id, "project_id": caller.project_id}
        user = users.create(session, **owner, email=f"{ids.new('u')}@example.org", name=name, is_operator=is_operator)
        session.flush()
        return f"/sign-in/{users.make_link(session, user, pepper=settings.key_pepper.get_secret_value().encode())}"


@pytest.fixture
def page(open_page: Open, system_sessions: Sessions, settings: Settings, organization: Caller) -> Page:
    """Signed in to the test's own organization."""
    opened = open_page()
    assert opened.submit(link_of(system_sessions, settings, organization)).status_code == 200
    return opened


@pytest.fixture
def strange_page(open_page: Open, system_sessions: Sessions, settings: Settings) -> Page:
    """Signed in to another organization."""
    opened = open_page()
    assert opened.submit(link_of(system_sessions, settings, make_organization(system_sessions))).status_code == 200
    return opened
