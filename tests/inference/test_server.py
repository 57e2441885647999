"""The private protocol over real sockets: errors before the first chunk are HTTP errors, a client that leaves is let go."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.core.engine import AdapterRef, Chunk, EngineStats, GenerateRequest, Heartbeat
from app.core.errors import NotFound
from app.core.settings import Settings
from app.core.storage import Storage
from app.inference.renderers import Renderers
from tests import make as rows
from tests.embedded.patience import PATIENCE_SECONDS
from tests.inference import make
from tests.inference.make import Words
from worker.inference.adapters import AdapterStore, Room
from worker.inference.driver import Caps
from worker.inference.engine import Engine
from worker.inference.native import NativeDriver
from worker.inference.routes import create_app
from worker.inference.server import DrainingServer
from worker.model.base import LoadedBase

TOKEN = "engine-token"
REF = AdapterRef(id="known", digest="a" * 64, prefix="known", base=rows.TINY)


class SlowRunner(make.SayingRunner):
    """Ten milliseconds a step, and it never ends by itself."""

    def run(self, slices):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return super().run(slices)


@dataclass
class Served:
    client: httpx.AsyncClient
    driver: NativeDriver
    server: DrainingServer


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(oracle: LoadedBase) -> Serve:
    """A server in this loop over the real driver, whose model only says what it is given."""

    def load(ref: AdapterRef) -> Words:
        if ref.id != REF.id:
            raise NotFound(f"the adapter {ref.id} is not in storage", param="model", code="model_not_found")
        return Words("weights")

    @contextlib.asynccontextmanager
    async def serve_one(*, max_batch: int = 4, max_waiting: int = 4) -> AsyncIterator[Served]:
        caps = Caps(oracle.entry, "nf4", oracle.renderer.context_length, 320, max_batch, 2, 16)
        engine = Engine(SlowRunner(), make.scheduler(max_batch=max_batch, max_waiting=max_waiting, step_tokens=64))
        driver = NativeDriver(engine, AdapterStore(load, base=oracle.entry, room=Room(2, 99, 99)), oracle.renderer, caps)
        config = uvicorn.Config(create_app(driver, token=TOKEN), port=0, log_config=None, lifespan="off")
        server = DrainingServer(config, driver)
        running = asyncio.create_task(server.serve())
        await make.until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=PATIENCE_SECONDS
            ) as client:
                yield Served(client, driver, server)
        finally:
            server.should_exit = True
            await running
            driver.close()

    return serve_one


def body(wanted: GenerateRequest) -> dict[str, object]:
    return wanted.model_dump(mode="json")


def lasting(ref: AdapterRef | None = None, *, max_tokens: int = 80) -> dict[str, object]:
    """About a second of tokens."""
    return body(make.request(ref=ref, max_tokens=max_tokens))


def run(story: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story

    asyncio.run(bounded())


def test_an_answer_is_lines_of_chunks(serve: Serve) -> None:
    async def story() -> None:
        async with serve() as served:
            answer = await served.client.post("/generate", json=body(make.request(ref=REF, max_tokens=3)))
            chunks = [Chunk.model_validate_json(line) for line in answer.text.splitlines()]

            assert answer.headers["content-type"] == "application/x-ndjson"
            assert [chunk.completion_tokens for chunk in chunks] == [1, 2, 3]
            assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]
            stats = EngineStats.model_validate_json((await served.client.get("/stats")).text)
            assert stats.adapters == (REF.internal_name,)

    run(story())


def test_strangers_learn_only_that_it_lives(serve: Serve) -> None:
    async def story() -> None:
        async with serve() as served:
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
                stranger = httpx.AsyncClient(base_url=served.client.base_url, headers=given, timeout=PATIENCE_SECONDS)
                async with stranger:
                    assert (await stranger.post("/generate", content=b"{")).status_code == 401
                    assert (await stranger.get("/stats")).json()["error"]["code"] == "invalid_api_key"
                    assert (await stranger.get("/healthz")).status_code == 200

    run(story())


def test_an_engine_without_a_token_does_not_start(serve: Serve) -> None:
    async def story() -> None:
        async with serve() as served:
            with pytest.raises(ValueError, match="token"):
                create_app(served.driver, token="")

    run(story())


def test_what_fails_before_the_first_chunk_is_an_http_error(serve: Serve) -> None:
    unknown = REF.model_copy(update={"id": "unknown", "digest": "b" * 64})
    foreign = REF.model_copy(update={"base": "another"})
    cases = [
        (lasting(unknown), 404, "model_not_found"),
        (lasting(foreign), 503, "base_not_loaded"),
        (body(make.request([5] * 600)), 400, "context_length_exceeded"),
        ({"prompt": []}, 400, "invalid_value"),
    ]

    async def story() -> None:
        async with serve() as served:
            for asked, status, code in cases:
                answer = await served.client.post("/generate", json=asked)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert (await served.client.post("/prefetch", json=cases[0][0]["adapter"])).status_code == 404
            assert (await served.client.post("/prefetch", json=REF.model_dump())).json() == {"adapter": REF.internal_name}

    run(story())


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    async def story() -> None:
        async with serve(max_batch=1, max_waiting=1) as served:
            asked = [asyncio.create_task(served.client.post("/generate", json=lasting())) for _ in range(2)]
            await make.until(lambda: (served.driver.stats().running, served.driver.stats().waiting) == (1, 1))
            refused = await served.client.post("/generate", json=lasting())

            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_overloaded")
            assert int(refused.headers["retry-after"]) > 0
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 200]

    run(story())


def test_a_client_that_leaves_frees_its_place_and_its_adapter(serve: Serve) -> None:
    async def story() -> None:
        async with serve() as served:
            async with served.client.stream("POST", "/generate", json=lasting(REF, max_tokens=450)) as answer:
                await anext(answer.aiter_lines())
                assert served.driver.stats().running == 1
                assert served.driver.evict(REF.digest) is False
            await make.until(lambda: served.driver.stats().running == 0, seconds=2)
            await make.until(lambda: served.driver.evict(REF.digest), seconds=2)
            told = (await served.client.get("/metrics")).text
            assert 'tunesmith_engine_answers_total{finish_reason="left"} 1.0' in told

    run(story())


def test_a_prompt_counts_where_it_is_answered(serve: Serve) -> None:
    async def story() -> None:
        async with serve() as served:
            unknown = lasting(REF.model_copy(update={"id": "unknown", "digest": "b" * 64}))
            assert (await served.client.post("/generate", json=unknown)).status_code == 404
            refused = (await served.client.get("/metrics")).text
            wanted = make.request(max_tokens=3)
            assert (await served.client.post("/generate", json=body(wanted))).status_code == 200
            answered = (await served.client.get("/metrics")).text

            assert "tunesmith_engine_prompt_tokens_total 0.0" in refused
            assert f"tunesmith_engine_prompt_tokens_total {len(wanted.prompt)}.0" in answered
            assert 'tunesmith_engine_answers_total{finish_reason="length"} 1.0' in answered
            assert 'tunesmith_engine_answers_total{finish_reason="left"} 0.0' in answered

    run(story())


def test_a_client_that_leaves_while_waiting_leaves_the_queue(serve: Serve) -> None:
    async def story() -> None:
        async with serve(max_batch=1) as served:
            running = asyncio.create_task(served.client.post("/generate", json=lasting(max_tokens=300)))
            await make.until(lambda: served.driver.stats().running == 1)
            waiting = asyncio.create_task(served.client.post("/generate", json=lasting()))
            await make.until(lambda: served.driver.stats().waiting == 1)
            waiting.cancel()
            await make.until(lambda: served.driver.stats().waiting == 0, seconds=2)

            assert (await running).status_code == 200

    run(story())


def test_on_a_signal_it_finishes_what_runs_and_takes_no_more(serve: Serve) -> None:
    async def story() -> None:
        async with serve(max_batch=1) as served:
            running = asyncio.create_task(served.client.post("/generate", json=lasting()))
            await make.until(lambda: served.driver.stats().running == 1)
            waiting = asyncio.create_task(served.client.post("/generate", json=lasting()))
            await make.until(lambda: served.driver.stats().waiting == 1)
            served.server.handle_exit(signal.SIGTERM, None)
            await make.until(lambda: served.driver.is_draining)
            for refused in (await waiting, await served.client.post("/generate", json=lasting())):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_draining")
            assert (await served.client.get("/healthz")).status_code == 503
            assert json.loads((await running).text.splitlines()[-1])["finish_reason"] == "length"
            await make.until(lambda: served.server.should_exit)

    run(story())


@pytest.fixture
def gateway() -> Iterator[tuple[str, list[tuple[str, Heartbeat]]]]:
    """What an engine tells a gateway: (authorization, heartbeat)."""
    heard = list[tuple[str, Heartbeat]]()

    class Listening(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/internal/engines":
                heard.append((self.headers["Authorization"], Heartbeat.model_validate_json(told)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", heard
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_the_process_announces_itself_answers_and_leaves_when_told(
    settings: Settings,
    storage: Storage,
    gateway: tuple[str, list[tuple[str, Heartbeat]]],
    published: dict[str, AdapterRef],
    tmp_path: Path,
) -> None:
    url, heard = gateway
    process = subprocess.Popen([sys.executable, "-m", "worker.inference.server"], env=environment(settings, url))
    try:
        waited_until = time.monotonic() + PATIENCE_SECONDS
        while len(heard) < 2 and time.monotonic() < waited_until and process.poll() is None:
            time.sleep(0.05)
        authorization, beat = heard[1]
        assert authorization == f"Bearer {TOKEN}"
        assert (beat.base, beat.running, beat.waiting) == (rows.TINY, 0, 0)
        assert Renderers(storage).get(rows.TINY).stop_ids
        wanted = body(make.request(ref=published["first"], max_tokens=200))
        with httpx.stream(
            "POST", f"{beat.url}/generate", json=wanted, headers={"Authorization": authorization}, timeout=PATIENCE_SECONDS
        ) as answer:
            lines = answer.iter_lines()
            assert Chunk.model_validate_json(next(lines)).finish_reason is None
            process.send_signal(signal.SIGTERM)
            assert Chunk.model_validate_json(list(lines)[-1]).finish_reason
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
    assert [beat.is_leaving for _, beat in heard[-2:]] == [False, True]


def environment(settings: Settings, gateway_url: str) -> dict[str, str]:
    stored = settings.storage
    assert stored.endpoint_url
    return {
        **os.environ,
        **rows.UNHURRIED,
        "TUNESMITH_STORAGE__ENDPOINT_URL": stored.endpoint_url,
        "TUNESMITH_STORAGE__BUCKET": stored.bucket,
        "TUNESMITH_STORAGE__ACCESS_KEY": stored.access_key,
        "TUNESMITH_STORAGE__SECRET_KEY": stored.secret_key.get_secret_value(),
        "TUNESMITH_CACHE_DIR": str(settings.cache_dir),
        "TUNESMITH_ENGINE_TOKEN": TOKEN,
        "TUNESMITH_INFERENCE__BASE": rows.TINY,
        "TUNESMITH_INFERENCE__GATEWAY_URL": gateway_url,
        "TUNESMITH_INFERENCE__HEARTBEAT_SECONDS": "0.2",
    }
