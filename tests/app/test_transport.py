"""What every answer has, whatever was asked."""

import asyncio
import json
import re
import socket

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app import db, handlers
from app.accounts import keys
from app.core.settings import Settings
from tests.embedded.patience import PATIENCE_SECONDS


def test_every_answer_has_a_request_id_and_every_error_the_envelope(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/v1/models", 200), ("GET", "/v1/nothing", 404), ("PUT", "/v1/files", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.headers["x-request-id"].startswith("req_")
        assert status == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "key",
    ["", "nonsense", "ts-short", keys.generate(), keys.generate()[:-1] + "!"],
    ids=["empty", "nonsense", "short", "unknown", "mistyped"],
)
def test_a_wrong_key_is_told_what_is_wrong_with_it(api_url: str, key: str) -> None:
    answer = httpx.get(f"{api_url}/v1/models", headers={"Authorization": f"Bearer {key}".strip()}, timeout=PATIENCE_SECONDS)

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] in {"invalid_api_key", "missing_api_key"}


def test_a_body_over_the_limit_is_refused_before_it_is_read(http: httpx.Client, settings: Settings) -> None:
    head = f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['authorization']}\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
        raw.sendall(f"{head}Content-Length: {settings.limits.body_bytes + 1}\r\n\r\n".encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


def test_a_body_without_length_is_counted_as_it_comes(http: httpx.Client, settings: Settings) -> None:
    chunks = (b" " * 1_000_000 for _ in range(settings.limits.body_bytes // 1_000_000 + 2))
    answer = http.post("/v1/fine_tuning/jobs", content=chunks, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_only_uploads_may_be_large(http: httpx.Client, api_url: str, settings: Settings) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    chunks = (b" " * 1_000_000 for _ in range(settings.limits.body_bytes // 1_000_000 + 2))
    assert http.post("/v1/chat/completions", content=chunks, headers=headers).status_code == 413
    assert httpx.post(f"{api_url}/internal/engines", content=b"{}", headers=headers, timeout=PATIENCE_SECONDS).status_code == 401


def test_a_header_that_names_another_organization_is_refused(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"OpenAI-Organization": "org-somebody"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "mismatched_scope")


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": "\\ud800", "training_file": "a"}'])
def test_a_body_that_is_no_request_is_a_400(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})

    assert answer.status_code in {400, 404}
    assert answer.json()["error"]["message"]


def test_models_are_listed_and_found_by_alias(client: OpenAI) -> None:
    listed = {model.id for model in client.models.list()}

    assert "smollm2-135m-instruct" in listed
    assert client.models.retrieve("HuggingFaceTB/SmolLM2-135M-Instruct").id == "smollm2-135m-instruct"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft:tiny:org::none")
    with pytest.raises(openai.BadRequestError):
        client.models.delete("smollm2-135m-instruct")


def test_docs_and_health_need_no_key(api_url: str) -> None:
    assert httpx.get(f"{api_url}/healthz", timeout=PATIENCE_SECONDS).status_code == 200
    manual = httpx.get(f"{api_url}/docs", timeout=PATIENCE_SECONDS)
    assert manual.status_code == 200
    for words in ("POST /v1/fine_tuning/jobs", "training_file", "LoraSpec", "target_modules"):
        assert words in manual.text
    assert "//" not in re.sub(r"<!doctype.*?>", "", manual.text)  # it takes nothing from elsewhere: it is read offline too
    paths = httpx.get(f"{api_url}/openapi.json", timeout=PATIENCE_SECONDS).json()["paths"]
    assert "/v1/fine_tuning/jobs" in paths
    assert not any(path.startswith("/internal") for path in paths)


def test_the_internal_routes_want_the_engine_token(http: httpx.Client) -> None:
    beat = {"engine_id": "e", "url": "http://x", "base": "b", "base_digest": "d", "running": 0, "waiting": 0}
    assert http.post("/internal/engines", json=beat).status_code == 401


def test_more_requests_at_once_than_threads_and_connections_are_all_answered(http: httpx.Client) -> None:
    async def ask() -> set[int]:
        unlimited = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=http.base_url, headers=http.headers, limits=unlimited, timeout=PATIENCE_SECONDS
        ) as client:
            answers = await asyncio.gather(*(client.get("/v1/fine_tuning/jobs") for _ in range(300)))
            return {one.status_code for one in answers}

    assert asyncio.run(ask()) == {200}


@pytest.mark.parametrize("path", ["files/a%00b", "fine_tuning/jobs/%00", "files?after=%00", "models/%00"])
def test_a_nul_in_an_id_is_no_crash(http: httpx.Client, path: str) -> None:
    assert http.get(f"/v1/{path}").status_code in {400, 404}


def test_a_query_that_takes_too_long_is_not_told_as_a_database_that_is_away(settings: Settings) -> None:
    hasty = db.open_sessions(settings.database.api_url, statement_seconds=1)
    with pytest.raises(OperationalError) as taking_long, hasty.begin() as session:
        session.execute(text("SELECT pg_sleep(3)"))
    hasty.kw["bind"].dispose()

    response = handlers.answer(taking_long.value)
    assert response.status_code == 503
    assert json.loads(bytes(response.body))["error"]["code"] == "query_took_too_long"
