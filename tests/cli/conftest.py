"""A customer at a terminal: the real command in this process, against the real API, with a home that holds nothing yet."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from app.core.settings import Settings
from cli.account import OURS, SDKS
from cli.main import main
from tests.cli.test_models import Said
from worker.services import open_services
from worker.tasks import validate

Tunesmith = Callable[..., Said]


@dataclass(frozen=True)
class Home:
    """Where the command looks: nobody is logged in."""

    folder: Path
    patch: pytest.MonkeyPatch

    def log_in(self, base_url: str, api_key: str) -> None:
        for name, value in zip(OURS, (base_url, api_key), strict=True):
            self.patch.setenv(name, value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in (*OURS, *SDKS):
        monkeypatch.delenv(name, raising=False)
    for name, folder in (("HOME", "."), ("XDG_CONFIG_HOME", "config"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.chdir(tmp_path)
    return Home(tmp_path, monkeypatch)


@pytest.fixture
def tunesmith(home: Home, client: OpenAI, capfd: pytest.CaptureFixture[str]) -> Tunesmith:
    """With the client's key in the environment."""
    home.log_in(str(client.base_url), client.api_key)

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Said(status, *capfd.readouterr())

    return run


@pytest.fixture
def validating(settings: Settings) -> Iterator[None]:
    """A worker that validates what is uploaded."""
    services, is_over = open_services(settings), threading.Event()

    def work() -> None:
        while not is_over.wait(0.05):
            validate.validate_next(services)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        services.sessions.kw["bind"].dispose()
