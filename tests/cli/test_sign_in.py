"""The operator's way into the dashboard."""

import json

import httpx
import pytest

from app.core.settings import Settings
from tests.cli.conftest import Tunesmith
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import environment


def test_a_link_signs_the_operator_in_once(
    tunesmith: Tunesmith, settings: Settings, api_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.of(settings, secrets=environment.PRIVATE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNESMITH_DASHBOARD__URL", api_url)
    said = tunesmith("sign-in", "--json")
    assert said.status == 0, said.err
    link = json.loads(said.out)["link"]
    assert link.startswith(f"{api_url}/sign-in/")

    with httpx.Client(follow_redirects=True, headers={"origin": api_url}, verify=False, timeout=PATIENCE_SECONDS) as browser:
        came = browser.post(link)
        assert (came.status_code, came.url.path) == (200, "/")
        assert 'href="/service"' in came.text  # which only operators are shown
    assert httpx.post(link, headers={"origin": api_url}, verify=False, timeout=PATIENCE_SECONDS).status_code == 404
