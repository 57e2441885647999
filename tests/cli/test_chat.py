"""Talking to a model from a terminal: the answer as it comes, mixes, conversations."""

import io
import json
from collections.abc import Iterator

import pytest
from sqlalchemy import delete, orm

from app.core.settings import Settings
from app.core.storage import Storage
from app.models import Engine
from cli.chat import parsed_adapter
from tests import make
from tests.cli.conftest import Tunesmith
from tests.cli.terminal import terminal
from tests.embedded.patience import eventually
from tests.inference import served
from tests.inference.make import SayingRunner

Sessions = orm.sessionmaker[orm.Session]
CHAT = ("chat", make.TINY, "--max-tokens", "4")


@pytest.fixture(scope="module", autouse=True)
def answer(settings: Settings, storage: Storage, system_sessions: Sessions) -> Iterator[str]:
    """Of an engine that says the same token again and again."""
    renderer = served.renderer(settings, storage)
    (*_, token) = renderer.plain("a")
    with served.served(SayingRunner([token]), renderer, settings) as (url, _):
        served.make_known(system_sessions, url)
        yield renderer.decode([token] * 4)
        with system_sessions.begin() as session:
            session.execute(delete(Engine))


def test_an_answer_is_written(tunesmith: Tunesmith, answer: str) -> None:
    said = tunesmith(*CHAT, "Hello", "--system", "Be brief.")

    assert (said.status, said.out, said.err) == (0, f"{answer}\n", "") and answer.isascii()


def test_as_json_it_is_the_services_answer(tunesmith: Tunesmith, answer: str) -> None:
    said = json.loads(tunesmith(*CHAT, "Hello", "--json").out)

    assert said["object"] == "chat.completion" and said["choices"][0]["message"]["content"] == answer


def test_a_message_may_come_from_a_pipe(tunesmith: Tunesmith, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))

    assert tunesmith(*CHAT).out == f"{answer}\n"


@pytest.mark.usefixtures("tunesmith")
def test_without_a_message_it_is_a_conversation(answer: str) -> None:
    with terminal(*CHAT) as screen:
        for number, keys in enumerate(("Hello\n", "And now?\n", "\x04"), 1):
            # keys that come before the prompt are the terminal's own business, and it forgets a Ctrl-D
            eventually(lambda: screen.seen.count("> ") == number)  # noqa: B023
            screen.type(keys)
        assert screen.status() == 0
        assert screen.seen.count(answer) == 2


@pytest.mark.parametrize(
    ("model", "why"), [("gpt-9", "gpt-9"), ("smollm2-135m-instruct", "no engine")], ids=["unknown", "without an engine"]
)
def test_what_cannot_be_asked_is_told_in_a_line(tunesmith: Tunesmith, model: str, why: str) -> None:
    said = tunesmith("chat", model, "Hello")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert why in said.err


@pytest.mark.parametrize(
    ("text", "model", "weight"),
    [
        ("ft:tiny:me:a:0f3k2x9a:0.7", "ft:tiny:me:a:0f3k2x9a", 0.7),
        ("ft:tiny:me:a:0f3k2x9a:-1", "ft:tiny:me:a:0f3k2x9a", -1.0),
        ("ft:tiny:me:a:12345678", "ft:tiny:me:a:12345678", 1.0),
        ("an-alias", "an-alias", 1.0),
    ],
)
def test_an_adapter_has_a_weight_behind_its_name(text: str, model: str, weight: float) -> None:
    assert parsed_adapter(text) == {"model": model, "weight": weight}


def test_adapters_are_sent_with_their_weights(tunesmith: Tunesmith) -> None:
    """Which the service would refuse in these words if they had not come as they were typed."""
    unknown = tunesmith(*CHAT, "Hello", "--adapter", "ft:nobody:0.5")
    heavy = tunesmith(*CHAT, "Hello", "--adapter", "ft:nobody:3")

    assert (unknown.status, heavy.status) == (1, 1)
    assert "ft:nobody" in unknown.err and "adapters" in heavy.err and "2" in heavy.err
    assert tunesmith(*CHAT, "Hello", "--adapter", "ft:nobody:0").status == 2
