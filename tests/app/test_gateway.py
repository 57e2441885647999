"""Between customer and engine: refusals are passed on, what was used is written down once, whoever leaves lets go."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import delete, func, orm, select, update

from app.core.engine import AdapterRef
from app.core.settings import Settings
from app.core.storage import Storage
from app.inference import engines
from app.models import Engine, UsageRecord
from tests import make
from tests.embedded.patience import eventually
from tests.inference import served
from tests.inference.make import SayingRunner
from worker.inference.native import NativeDriver

Sessions = orm.sessionmaker[orm.Session]
Serve = Callable[..., NativeDriver]
CHAT = {"model": make.TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 300}


class Paced(SayingRunner):
    """Five milliseconds a step."""

    def run(self, slices):  # type: ignore[no-untyped-def]
        time.sleep(0.005)
        return super().run(slices)


@pytest.fixture
def serve(settings: Settings, storage: Storage, system_sessions: Sessions) -> Iterator[Serve]:
    """Starts engines that the gateway knows of, one after the other."""
    renderer, opened = served.renderer(settings, storage), ExitStack()

    def one(runner: SayingRunner | None = None, **limits: int) -> NativeDriver:
        url, driver = opened.enter_context(served.served(runner or Paced(), renderer, settings, **limits))
        served.make_known(system_sessions, url)
        return driver

    with opened:
        yield one
        with system_sessions.begin() as session:
            session.execute(delete(Engine))


def usage(sessions: Sessions, request_id: str) -> list[tuple[int, int]]:
    with sessions.begin() as session:
        found = select(UsageRecord).where(UsageRecord.request_id == request_id)
        return [(record.prompt_tokens, record.completion_tokens) for record in session.scalars(found)]


def test_too_many_of_one_organization_are_told_to_come_again(http: httpx.Client, serve: Serve) -> None:
    first, second = (serve(max_batch=1, max_waiting_of_tenant=1) for _ in range(2))
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 60}), range(6)))

    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
    assert (first.stats().running, second.stats().running) == (0, 0)


def test_an_engine_that_leaves_is_not_asked_any_more_and_is_waited_for(
    http: httpx.Client, serve: Serve, settings: Settings, system_sessions: Sessions
) -> None:
    serve()
    with system_sessions.begin() as session:
        engine = session.scalars(select(Engine)).one()
        about = {"url": engine.url, "base": engine.base, "base_digest": engine.base_digest, "running": 0, "waiting": 0}
    goodbye = {"engine_id": engine.id, **about, "is_leaving": True}
    authorization = {"Authorization": f"Bearer {settings.engine_token.get_secret_value()}"}
    assert http.post("/internal/engines", json=goodbye, headers=authorization).status_code == 204

    answer = http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_not_loaded")
    assert answer.headers["retry-after"] == "2"


def test_the_prompt_of_several_answers_is_read_once(http: httpx.Client, serve: Serve) -> None:
    runner = Paced()
    serve(runner)
    said = http.post("/v1/chat/completions", json=CHAT | {"n": 4, "max_tokens": 5}).json()
    read = sum(count for step in runner.steps for _, count in step) - 4 * 4  # all but the first token of an answer are read

    assert said["usage"]["completion_tokens"] == 4 * 5
    assert read <= said["usage"]["prompt_tokens"] + 3 * 16
    assert said["usage"]["prompt_tokens"] > 16


@pytest.mark.parametrize("answers", [1, 3])
def test_who_leaves_in_the_middle_lets_go_and_is_metered_once(
    http: httpx.Client, serve: Serve, system_sessions: Sessions, answers: int
) -> None:
    driver = serve()
    with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "n": answers}) as response:
        lines = response.iter_lines()
        told = [next(lines) for _ in range(12)]
    eventually(lambda: driver.stats().running == 0)
    eventually(lambda: usage(system_sessions, response.headers["x-request-id"]))

    (record,) = usage(system_sessions, response.headers["x-request-id"])
    assert any("content" in line for line in told)
    assert 0 < record[1] < 300 * answers
    assert driver.stats().held_pages == 0


def broken_off(http: httpx.Client, settings: Settings) -> float:
    """How many answers the gateway has counted that an engine broke off."""
    headers = {"Authorization": f"Bearer {settings.metrics.token.get_secret_value()}"}
    families = text_string_to_metric_families(http.get("/metrics", headers=headers).text)
    refused = next(family for family in families if family.name == "tunesmith_gateway_rejections")
    return sum(sample.value for sample in refused.samples if sample.labels["reason"] == "engine_failed")


def test_an_engine_that_breaks_ends_the_stream_with_an_error_and_what_it_said_is_metered(
    http: httpx.Client, serve: Serve, system_sessions: Sessions, settings: Settings
) -> None:
    driver, before = serve(), broken_off(http, settings)
    with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        told = [next(lines) for _ in range(6)]
        driver.close()
        rest = list(lines)

    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    eventually(lambda: usage(system_sessions, response.headers["x-request-id"]))
    (record,) = usage(system_sessions, response.headers["x-request-id"])
    assert error["code"] == "engine_failed"
    assert rest[-1] == "data: [DONE]"
    assert broken_off(http, settings) == before + 1
    assert len(told) - 2 <= record[1] < 300


def test_a_stream_that_broke_off_is_not_what_its_key_is_answered_with(http: httpx.Client, serve: Serve) -> None:
    named, body = {"Idempotency-Key": uuid.uuid4().hex}, CHAT | {"stream": True}
    driver = serve()
    with http.stream("POST", "/v1/chat/completions", json=body, headers=named) as response:
        lines = response.iter_lines()
        next(lines)
        driver.close()
        assert "engine_failed" in "".join(lines)
    serve()
    again, replayed = (http.post("/v1/chat/completions", json=body, headers=named) for _ in range(2))

    assert "idempotent-replayed" not in again.headers and '"finish_reason":"length"' in again.text
    assert replayed.headers["idempotent-replayed"] == "true" and replayed.text == again.text


def test_a_reader_that_stops_reading_holds_up_nobody(http: httpx.Client, serve: Serve) -> None:
    serve()
    asleep, is_over = threading.Event(), threading.Event()

    def read_nothing() -> None:
        with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}):
            asleep.set()
            is_over.wait(30)

    with ThreadPoolExecutor(4) as pool:
        sleepers = [pool.submit(read_nothing) for _ in range(3)]
        assert asleep.wait(10)
        said = http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 20})
        is_over.set()
        for sleeper in sleepers:
            sleeper.result()

    assert said.json()["usage"]["completion_tokens"] == 20


def test_a_base_without_its_engine_is_told_by_chats_and_by_readyz(
    http: httpx.Client, serve: Serve, system_sessions: Sessions
) -> None:
    serve()
    with system_sessions.begin() as session:
        silent_since = func.clock_timestamp() - timedelta(seconds=60)
        session.execute(update(Engine).values(heartbeat_at=silent_since))
    chat, ready = http.post("/v1/chat/completions", json=CHAT), http.get("/readyz")

    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "base_not_loaded")
    assert 0 < int(chat.headers["retry-after"]) <= 120
    assert (ready.status_code, ready.json()["bases"], ready.json()["bases_away"]) == (503, [], [make.TINY])


def test_an_adapter_is_asked_elsewhere_while_many_wait_at_its_engine() -> None:
    known = [Engine(id=name, url=name, base="b", base_digest="d", quantization="nf4", running=0, waiting=0) for name in "abc"]
    ref = AdapterRef(id="adapter_1", digest="a" * 64, prefix="adapters/1", base="b")
    first, second, _ = engines.ranked(known, [ref])
    first.waiting = engines.LONG_QUEUE

    assert engines.ranked(known, [ref])[0] is second
    for engine in known:
        engine.waiting = 99
    assert engines.ranked(known, [ref])[0] is first
