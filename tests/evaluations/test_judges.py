"""Judges at an operator's endpoint: a real server that speaks the chat API, or fails to."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.accounts.caller import Caller
from app.core import judges
from app.core.errors import AppError, NotFound, Unavailable
from app.core.judges import Judge
from app.evaluations.asking import Asker, JudgeRefused
from app.inference.gateway import Gateway
from app.inference.renderers import Renderers
from app.inference.service import Whole
from worker.services import Services

ASKED = [{"role": "user", "content": "Rate it."}]
GOOD = {
    "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1},
}


class Endpoint:
    """Answers every request with `status` and `body`, and remembers what it was sent."""

    def __init__(self) -> None:
        self.status, self.body, self.headers = 200, json.dumps(GOOD).encode(), dict[str, str]()
        self.received = list[tuple[str, dict[str, str], Any]]()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.received.append((self.path, {name.lower(): value for name, value in self.headers.items()}, sent))
                self.send_response(endpoint.status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(endpoint.body)))
                self.end_headers()
                self.wfile.write(endpoint.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def ask(services: Services, judge: Judge, caller: Caller, *, as_judge: bool = True, **sampling: Any) -> Whole:
    async def story() -> Whole:
        settings = services.settings
        gateway = Gateway(
            services.sessions, services.catalog, Renderers(services.storage), settings.inference, settings.engine_token
        )
        asker = Asker(gateway, {"the-judge": judge})
        put = asker.judge if as_judge else asker.ask
        try:
            return await put(caller, "the-judge", ASKED, **sampling)
        finally:
            await asker.close()
            await gateway.close()

    return asyncio.run(story())


def test_a_judge_is_asked_by_its_own_name_with_its_key(services: Services, endpoint: Endpoint, organization: Caller) -> None:
    judge = Judge.model_validate({"base_url": f"{endpoint.url}/", "model": "large-1", "api_key": "secret"})
    reply = ask(services, judge, organization, temperature=0.0, seed=None, max_tokens=16)
    ((path, headers, sent),) = endpoint.received

    assert reply == Whole("4", "stop", 9, 1)
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert sent == {"model": "large-1", "messages": ASKED, "temperature": 0.0, "max_tokens": 16}


@pytest.mark.parametrize(
    ("status", "body", "failure"),
    [
        (503, b"", Unavailable),
        (429, b"", Unavailable),
        (401, b'{"error": {"message": "bad key"}}', JudgeRefused),
        (404, b"", JudgeRefused),
        (200, b"<html>", JudgeRefused),
        (200, b'{"choices": []}', JudgeRefused),
        (200, b"[]", JudgeRefused),
    ],
)
def test_what_a_judge_fails_with_is_told_from_what_may_pass(
    services: Services, endpoint: Endpoint, organization: Caller, status: int, body: bytes, failure: type[AppError]
) -> None:
    endpoint.status, endpoint.body = status, body
    with pytest.raises(failure):
        ask(services, Judge(base_url=endpoint.url, model="m"), organization)


def test_no_redirect_is_followed(services: Services, endpoint: Endpoint, organization: Caller) -> None:
    """It would lead wherever the endpoint says, with the messages of a customer."""
    endpoint.status, endpoint.headers = 307, {"location": f"{endpoint.url}/elsewhere"}
    with pytest.raises(JudgeRefused):
        ask(services, Judge(base_url=endpoint.url, model="m"), organization)

    assert len(endpoint.received) == 1


def test_a_model_that_is_evaluated_is_never_a_judge_of_that_name(
    services: Services, endpoint: Endpoint, organization: Caller
) -> None:
    with pytest.raises(NotFound):
        ask(services, Judge(base_url=endpoint.url, model="m"), organization, as_judge=False)

    assert endpoint.received == []


def test_a_judge_that_is_away_may_answer_later(services: Services, endpoint: Endpoint, organization: Caller) -> None:
    with pytest.raises(Unavailable):
        ask(services, Judge(base_url="http://127.0.0.1:9/v1", model="m"), organization)


def test_judges_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "judges.toml"
    file.write_text('[large]\nbase_url = "https://api.example.com/v1"\nmodel = "large-1"\napi_key = "k"\n')

    assert judges.load(file)["large"].url == "https://api.example.com/v1/chat/completions"
    assert judges.load(None) == {}


@pytest.mark.parametrize(
    "text",
    ["[large", '[a]\nmodel = "x"', '[a]\nmodel = "x"\nbase_url = "file:///etc"', 'model = "x"', "[a]\nmodel=1\nurl=2"],
)
def test_a_file_that_lists_no_judges_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "judges.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file} lists no judges"):
        judges.load(file)
