"""A POST with an `Idempotency-Key` is done once, whoever repeats it and when."""

import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI, UnprocessableEntityError
from sqlalchemy import func, orm, select, update

from app import idempotency
from app.accounts.caller import Caller
from app.core.storage import Storage
from app.models import Evaluation, File, IdempotentAnswer, Job, OutboxMessage
from tests import make
from tests.conftest import make_key, sdk

GRADER = {"type": "string_check", "name": "g", "operation": "eq", "input": "a", "reference": "a"}


def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def create(client: OpenAI, file_id: str, headers: dict[str, str], **more: Any) -> str:
    return client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id, extra_headers=headers, **more).id


def count(sessions: orm.sessionmaker[orm.Session], table: type[Job | File | Evaluation], organization: Caller) -> int:
    with sessions.begin() as session:
        mine = select(func.count()).select_from(table).where(table.organization_id == organization.organization_id)
        return session.scalars(mine).one()


def test_the_same_request_with_the_same_key_is_one_job(
    client: OpenAI, http: httpx.Client, file_id: str, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    named, body = key(), {"model": make.TINY, "training_file": file_id, "seed": 4}
    first = http.post("/v1/fine_tuning/jobs", json=body, headers=named)
    again = http.post("/v1/fine_tuning/jobs", json=body, headers=named)

    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert count(system_sessions, Job, organization) == 1


def test_another_request_with_the_key_is_refused_in_words(client: OpenAI, file_id: str) -> None:
    named = key()
    create(client, file_id, named, seed=1)

    with pytest.raises(UnprocessableEntityError) as refused:
        create(client, file_id, named, seed=2)
    assert (refused.value.code, refused.value.param) == ("idempotency_key_reused", "Idempotency-Key")
    assert "a key of its own" in str(refused.value)


def test_the_same_body_at_another_path_is_another_request(client: OpenAI, http: httpx.Client, file_id: str) -> None:
    jobs, named = [create(client, file_id, {}) for _ in range(2)], key()

    assert http.post(f"/v1/fine_tuning/jobs/{jobs[0]}/cancel", headers=named).status_code == 200
    assert http.post(f"/v1/fine_tuning/jobs/{jobs[1]}/cancel", headers=named).status_code == 422


@pytest.mark.parametrize("table", [Job, Evaluation])
def test_requests_at_the_same_moment_are_one(
    http: httpx.Client,
    file_id: str,
    organization: Caller,
    system_sessions: orm.sessionmaker[orm.Session],
    table: type[Job | Evaluation],
) -> None:
    named, barrier = key(), threading.Barrier(6)
    path, body = "/v1/fine_tuning/jobs", {"model": make.TINY, "training_file": file_id}
    if table is Evaluation:
        with system_sessions.begin() as session:
            session.get_one(File, file_id).purpose = "evals"
        path, body = "/v1/evaluations", {"file": file_id, "models": [make.TINY], "graders": [GRADER]}

    def create_at_once(_: int) -> str:
        barrier.wait()
        return str(http.post(path, json=body, headers=named, timeout=60).json()["id"])

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(create_at_once, range(6)))) == 1
    assert count(system_sessions, table, organization) == 1


def test_what_was_refused_is_tried_again(client: OpenAI, http: httpx.Client, file_id: str) -> None:
    named = key()
    refused = http.post("/v1/fine_tuning/jobs", json={"model": "nobody's", "training_file": file_id}, headers=named)

    assert refused.status_code == 404
    assert create(client, file_id, named)


def test_keys_of_others_are_others(client: OpenAI, stranger: OpenAI) -> None:
    named = key()
    mine, theirs = (
        one.files.create(file=("a.jsonl", make.chat_file()), purpose="fine-tune", extra_headers=named)
        for one in (client, stranger)
    )

    assert mine.id != theirs.id


def test_keys_of_one_project_are_one_whichever_api_key_it_comes_with(
    client: OpenAI,
    api_url: str,
    settings: Any,
    file_id: str,
    organization: Caller,
    system_sessions: orm.sessionmaker[orm.Session],
) -> None:
    named, other_key = key(), make_key(system_sessions, settings, organization)
    with sdk(api_url, other_key) as colleague:
        assert create(client, file_id, named) == create(colleague, file_id, named)


def upload(client: OpenAI, content: bytes, headers: dict[str, str]) -> str:
    return client.files.create(file=("a.jsonl", content), purpose="fine-tune", extra_headers=headers).id


def test_a_file_is_uploaded_once(
    client: OpenAI, organization: Caller, storage: Storage, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    named = key()
    first, again = (upload(client, make.chat_file(), named) for _ in range(2))
    with pytest.raises(UnprocessableEntityError):
        upload(client, make.chat_file(13), named)

    assert first == again and count(system_sessions, File, organization) == 1
    kept = list(storage.list_keys(f"orgs/{organization.organization_id}/files/"))
    assert kept == [f"orgs/{organization.organization_id}/files/{first}"]


def test_what_is_read_as_it_comes_is_decided_by_the_route(client: OpenAI, http: httpx.Client, file_id: str) -> None:
    """Not by what the client calls it: neither is a large body gathered to be refused, nor a key overlooked."""
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['authorization']}\r\nIdempotency-Key: a\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=10) as raw:
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 400000000\r\n\r\n{{".encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 400")

    path, headers = f"/v1/fine_tuning/jobs/{create(client, file_id, {})}/cancel", key() | {"Content-Type": "multipart/mixed"}
    assert [http.post(path, headers=headers).headers.get("idempotent-replayed") for _ in range(2)] == [None, "true"]


@pytest.mark.parametrize("bad", ["", "two words", "ä".encode(), "x" * 256])
def test_a_key_that_cannot_be_kept_is_refused(http: httpx.Client, file_id: str, bad: str | bytes) -> None:
    headers = {"Idempotency-Key": bad if isinstance(bad, bytes) else bad.encode()}
    answer = http.post("/v1/fine_tuning/jobs", json={"model": make.TINY, "training_file": file_id}, headers=headers)  # type: ignore[arg-type]

    assert make.require_envelope(answer.status_code, answer.json())["code"] == "invalid_idempotency_key"
    assert answer.status_code == 400


def test_keys_are_forgotten_after_a_day(
    client: OpenAI, file_id: str, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    named = key()
    first = create(client, file_id, named)
    with system_sessions.begin() as session:
        mine = IdempotentAnswer.organization_id == organization.organization_id
        session.execute(update(IdempotentAnswer).where(mine).values(created_at=func.now() - timedelta(hours=25)))
        idempotency.expire(session)

    assert create(client, file_id, named) != first


def test_every_post_of_the_document_names_the_header(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    without = [
        path
        for path, operations in document["paths"].items()
        if "post" in operations
        and "Idempotency-Key" not in {parameter["name"] for parameter in operations["post"].get("parameters", ())}
    ]

    assert without == []


def test_a_file_whose_row_was_never_written_does_not_lie_for_ever(
    client: OpenAI, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    """Its deletion was promised before its first byte."""
    file_id = upload(client, make.chat_file(), {})
    with system_sessions.begin() as session:
        prefix = f"orgs/{organization.organization_id}/files/{file_id}"
        promised = select(OutboxMessage).where(OutboxMessage.topic == "tidy", OutboxMessage.payload["prefix"].astext == prefix)
        assert session.scalars(promised).one().not_before > session.scalar(select(func.now() + timedelta(hours=23)))


def test_a_burst_with_keys_of_their_own_is_answered_whole(
    client: OpenAI, file_id: str, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    """More at once than there are threads and connections: none waits for a thread with a connection in hand."""
    with ThreadPoolExecutor(120) as threads:
        made = set(threads.map(lambda seed: create(client, file_id, key(), seed=seed), range(120)))

    assert len(made) == 120 == count(system_sessions, Job, organization)
