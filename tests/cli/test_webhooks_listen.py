"""A receiver on one's own machine: it shows what is rightly signed and nothing else, and leaves no endpoint behind."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core.settings import Settings, WebhookSettings
from app.webhooks import signing
from app.webhooks.emit import EventType
from tests.cli.conftest import Home, Tunesmith
from tests.conftest import serving_api
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.webhooks import receiver
from tests.webhooks.steps import deliver, emit_event

Sessions = orm.sessionmaker[orm.Session]
ROOT = Path(__file__).parents[2]


class Listener:
    """`tunesmith webhooks listen` as a process, until Ctrl-C."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "cli.main", "webhooks", "listen", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stderr and self._process.stdout
        self.greeting = self._process.stderr.readline()
        self.lines = list[str]()
        self._reader = threading.Thread(target=lambda: self.lines.extend(self._process.stdout or ()))
        self._reader.start()

    def end(self) -> int:
        self._process.send_signal(signal.SIGINT)
        status = self._process.wait(timeout=PATIENCE_SECONDS)
        self._reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe
            pipe.close()
        return status


@contextmanager
def listening(*arguments: str) -> Iterator[Listener]:
    listener = Listener(*arguments)
    try:
        yield listener
    finally:
        listener.end()


@pytest.fixture(scope="module")
def closed_api(settings: Settings) -> Iterator[str]:
    """An API that lets no webhook go to its own machine."""
    with serving_api(settings.model_copy(update={"webhooks": WebhookSettings()})) as url:
        yield url


def test_what_happens_is_shown_and_sent_on_and_the_endpoint_is_removed(
    home: Home, client: OpenAI, system_sessions: Sessions, organization: Caller
) -> None:
    home.log_in(str(client.base_url), client.api_key)
    with receiver.running() as other, listening("--forward", other.url, "--events", EventType.FAILED) as listener:
        (endpoint,) = client.webhooks.list().data
        emit_event(system_sessions, organization, data_id="ftjob-unasked")
        emit_event(system_sessions, organization, EventType.FAILED, data_id="ftjob-wanted")
        while deliver(system_sessions):
            pass
        eventually(lambda: listener.lines)

    assert listener.greeting.startswith(f"tunesmith: {endpoint.id} tells {endpoint.url} ")
    assert [line.split()[1:] for line in listener.lines] == [["fine_tuning.job.failed", "ftjob-wanted", "→", "200"]]
    assert [json.loads(request.body)["data"]["id"] for request in other.received] == ["ftjob-wanted"]
    assert client.webhooks.list().data == []


def test_with_the_secret_of_an_endpoint_none_is_made_and_what_is_wrongly_signed_is_refused(home: Home) -> None:
    secret, body = signing.new_secret(), json.dumps({"created_at": 1, "type": "any", "data": {"id": "x"}}).encode()
    with listening("--secret", secret, "--json") as listener:
        url = listener.greeting.split()[3].rstrip(";")
        signed = signing.headers([secret], message_id="a", unix_seconds=int(time.time()), body=body)
        answers = [
            httpx.post(url, content=content, headers=signed, timeout=PATIENCE_SECONDS).status_code
            for content in (body, body + b" ")
        ]
        eventually(lambda: listener.lines)

    assert answers == [204, 401]
    assert list(map(json.loads, listener.lines)) == [json.loads(body)]


def test_where_the_service_cannot_come_is_said_with_what_to_do(
    closed_api: str, tunesmith: Tunesmith, home: Home, client: OpenAI
) -> None:
    home.log_in(f"{closed_api}/v1", client.api_key)
    said = tunesmith("webhooks", "listen")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "--url says where the service reaches this machine" in said.err
    assert "--secret is none" in tunesmith("webhooks", "listen", "--secret", "whsec_=").err
