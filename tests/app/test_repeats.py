"""Every POST of the document, sent once more under its `Idempotency-Key`: it is answered as before, and not done again."""

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import delete, orm

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.core.storage import Storage
from app.models import Engine, File, WebhookEndpoint
from tests import make
from tests.inference import served
from tests.inference.make import SayingRunner

PART = b"abc"
UPLOAD = {"purpose": "fine-tune", "filename": "a.jsonl", "bytes": len(PART), "mime_type": "text/jsonl"}
CHAT = {"model": make.TINY, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
COMPLETION = {"model": make.TINY, "prompt": "hello", "max_tokens": 5}
GRADER = {"type": "string_check", "name": "g", "operation": "eq", "input": "{{sample.output_text}}", "reference": "a"}
HOOK = {"url": "http://127.0.0.1:9/hooks", "event_types": ["fine_tuning.job.failed"]}


@dataclass(frozen=True)
class At:
    """A customer, and what it needs before it can ask."""

    http: httpx.Client
    client: OpenAI
    sessions: orm.sessionmaker[orm.Session]
    caller: Caller

    def made(self, make_one: Callable[[orm.Session, Caller], Any]) -> Any:
        with self.sessions.begin() as session:
            return make_one(session, self.caller)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def file(self) -> str:
        return str(self.made(make.valid_file).id)

    def job(self) -> str:
        return str(self.made(make.queued_job).id)

    def paused(self) -> str:
        return self.client.fine_tuning.jobs.pause(self.job()).id

    def tuned(self) -> str:
        name = self.made(make.tuned_model)
        return next(job.id for job in self.client.fine_tuning.jobs.list() if job.fine_tuned_model == name)

    def sweep(self) -> str:
        return str(self.made(make.sweep).id)

    def asked_from(self) -> str:
        def to_evaluate(session: orm.Session, caller: Caller) -> File:
            file = make.valid_file(session, caller)
            file.purpose = "evals"
            return file

        return str(self.made(to_evaluate).id)

    def evaluation(self) -> str:
        return str(self.made(lambda session, caller: make.evaluation(session, caller, make.TINY))[0].id)

    def alias(self, *moves: str) -> str:
        self.post("/v1/model_aliases", {"name": "prod", "model": make.TINY})
        for model in moves:
            self.post("/v1/model_aliases/prod", {"model": model})
        return "prod"

    def upload(self) -> str:
        return str(self.post("/v1/uploads", UPLOAD)["id"])

    def endpoint(self) -> str:
        return str(self.post("/v1/webhook_endpoints", HOOK)["id"])

    def delivery(self) -> tuple[str, str]:
        endpoint_id = self.endpoint()
        return endpoint_id, self.made(lambda session, caller: make.delivery(session, caller, endpoint_id)).id


Asking = tuple[tuple[str, ...], dict[str, Any]]  # what stands in the path's braces, and what httpx sends


def part(at: At) -> Asking:
    return (at.upload(),), {"files": {"data": PART}}


def completion(at: At) -> Asking:
    upload_id = at.upload()
    part_id = at.client.uploads.parts.create(upload_id, data=PART).id
    return (upload_id,), {"json": {"part_ids": [part_id]}}


POSTS: dict[str, Callable[[At], Asking]] = {
    "/v1/files": lambda _: ((), {"files": {"file": b"a"}, "data": {"purpose": "fine-tune"}}),
    "/v1/uploads": lambda _: ((), {"json": UPLOAD}),
    "/v1/uploads/{upload_id}/parts": part,
    "/v1/uploads/{upload_id}/complete": completion,
    "/v1/uploads/{upload_id}/cancel": lambda at: ((at.upload(),), {}),
    "/v1/fine_tuning/jobs": lambda at: ((), {"json": {"model": make.TINY, "training_file": at.file()}}),
    "/v1/fine_tuning/jobs/{job_id}/cancel": lambda at: ((at.job(),), {}),
    "/v1/fine_tuning/jobs/{job_id}/pause": lambda at: ((at.job(),), {}),
    "/v1/fine_tuning/jobs/{job_id}/resume": lambda at: ((at.paused(),), {}),
    "/v1/fine_tuning/jobs/{job_id}/publish": lambda at: ((at.tuned(),), {}),
    "/v1/fine_tuning/sweeps": lambda at: (
        (),
        {
            "json": {
                "model": make.TINY,
                "training_file": at.file(),
                "training": {"validation_split": 2},
                "grid": {"training.learning_rate": [1e-3, 1e-4]},
            }
        },
    ),
    "/v1/fine_tuning/sweeps/{sweep_id}/cancel": lambda at: ((at.sweep(),), {}),
    "/v1/fine_tuning/alpha/graders/run": lambda _: ((), {"json": {"grader": GRADER, "model_sample": "a"}}),
    "/v1/fine_tuning/alpha/graders/validate": lambda _: ((), {"json": {"grader": GRADER}}),
    "/v1/evaluations": lambda at: ((), {"json": {"file": at.asked_from(), "models": [make.TINY], "graders": [GRADER]}}),
    "/v1/evaluations/{evaluation_id}/cancel": lambda at: ((at.evaluation(),), {}),
    "/v1/model_aliases": lambda _: ((), {"json": {"name": "prod", "model": make.TINY}}),
    "/v1/model_aliases/{name}": lambda at: ((at.alias(),), {"json": {"model": at.made(make.tuned_model)}}),
    "/v1/model_aliases/{name}/rollback": lambda at: ((at.alias(*(at.made(make.tuned_model) for _ in range(2))),), {}),
    "/v1/chat/completions": lambda _: ((), {"json": CHAT}),
    "/v1/completions": lambda _: ((), {"json": COMPLETION}),
    "/v1/webhook_endpoints": lambda _: ((), {"json": HOOK}),
    "/v1/webhook_endpoints/{endpoint_id}": lambda at: ((at.endpoint(),), {"json": {"name": "new"}}),
    "/v1/webhook_endpoints/{endpoint_id}/rotate_secret": lambda at: ((at.endpoint(),), {"json": {}}),
    "/v1/webhook_endpoints/{endpoint_id}/test": lambda at: (
        (at.endpoint(),),
        {"json": {"event_type": "fine_tuning.job.failed"}},
    ),
    "/v1/webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}/replay": lambda at: (at.delivery(), {}),
    "/v1/webhook_endpoints/{endpoint_id}/replay": lambda at: (at.delivery()[:1], {"json": {"since": 0}}),
}
STREAMS = {
    "/v1/chat/completions": CHAT | {"stream": True, "stream_options": {"include_usage": True}},
    "/v1/completions": COMPLETION | {"stream": True},
}


@pytest.fixture(scope="module")
def engine(settings: Settings, storage: Storage) -> Iterator[str]:
    with served.served(SayingRunner(), served.renderer(settings, storage), settings) as (url, _):
        yield url


@pytest.fixture
def at(
    http: httpx.Client, client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], organization: Caller, engine: str
) -> Iterator[At]:
    served.make_known(system_sessions, engine)
    yield At(http, client, system_sessions, organization)
    with system_sessions.begin() as session:
        session.execute(delete(Engine))
        session.execute(delete(WebhookEndpoint).where(WebhookEndpoint.organization_id == organization.organization_id))


def require_answered_once(http: httpx.Client, path: str, sent: dict[str, Any]) -> None:
    named = {"Idempotency-Key": uuid.uuid4().hex}
    first, again = (http.post(path, headers=named, **sent) for _ in range(2))
    other = http.post(path, headers=named, params={"other": "1"}, **sent)

    assert first.status_code == again.status_code == 200, first.text
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert (again.content, again.headers["content-type"]) == (first.content, first.headers["content-type"])
    assert make.require_envelope(other.status_code, other.json())["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("path", POSTS)
def test_what_is_asked_again_is_answered_as_before(at: At, path: str) -> None:
    named, sent = POSTS[path](at)
    require_answered_once(at.http, re.sub(r"{\w+}", "{}", path).format(*named), sent)


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_is_asked_for_again_is_told_as_before(at: At, path: str) -> None:
    require_answered_once(at.http, path, {"json": STREAMS[path]})


def test_these_are_all_there_are(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    assert POSTS.keys() == {path for path, operations in document["paths"].items() if "post" in operations}
