"""The test event: sent at once by the API itself, and told how it went."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler

import httpx
import openai
import psycopg
import pytest
from openai import OpenAI
from openai.types.webhooks import WebhookEndpointTestResult
from sqlalchemy import text
from standardwebhooks import Webhook

from app.accounts.caller import Caller
from app.webhooks.emit import EventType
from tests.webhooks.receiver import Receiver, answering, running
from tests.webhooks.steps import Sessions, change_endpoints, deliver, emit_event, endpoint_of, rows_of, wait_until
from worker.embedded import Servers

SUCCEEDED, FAILED = "fine_tuning.job.succeeded", "fine_tuning.job.failed"


def test_a_sample_arrives_signed_and_disturbs_no_queue(
    client: OpenAI, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    emit_event(system_sessions, organization, EventType.FAILED)
    result = client.webhooks.test(made.id, event_type=SUCCEEDED)

    assert WebhookEndpointTestResult.model_validate(result.model_dump())
    assert (result.webhook_endpoint_id, result.event_type) == (made.id, SUCCEEDED)
    assert (result.success, result.status_code, (result.model_extra or {})["error"]) == (True, 200, None)
    (request,) = receiver.received
    event = Webhook(made.signing_secret).verify(request.body, request.headers)
    assert (event["object"], event["type"], event["data"]) == ("event", SUCCEEDED, {"id": "sample"})
    assert client.webhooks.unwrap(request.body, request.headers, secret=made.signing_secret).type == SUCCEEDED
    assert [row.attempts for row in rows_of(system_sessions, organization)] == [0]
    assert deliver(system_sessions) == 1
    assert json.loads(receiver.received[1].body)["type"] == FAILED


@pytest.mark.parametrize("status", [302, 404, 500])
def test_what_the_receiver_answers_is_told(client: OpenAI, receiver: Receiver, status: int) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    receiver.answer = answering(status, Location="http://127.0.0.1:1/")
    result = client.webhooks.test(made.id, event_type=FAILED)

    assert (result.success, result.status_code) == (True, status)
    assert f"the receiver answered {status}" in (result.model_extra or {})["error"]
    assert len(receiver.received) == 1


def test_a_receiver_that_does_not_answer_is_an_answer(client: OpenAI, http: httpx.Client) -> None:
    with running() as gone:
        url = gone.url
    made = client.webhooks.create(name="a", url=url, event_types=[FAILED])
    answer = http.post(f"/v1/webhook_endpoints/{made.id}/test", json={"event_type": FAILED})

    assert answer.status_code == 200
    assert (answer.json()["success"], answer.json()["status_code"]) == (False, None)
    assert answer.json()["error"].startswith("could not connect")


def test_where_a_webhook_may_not_go_a_sample_may_not_either(
    client: OpenAI, http: httpx.Client, system_sessions: Sessions, organization: Caller
) -> None:
    made = client.webhooks.create(name="a", url="https://hooks.example.com/", event_types=[FAILED])
    for url in ("http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[::ffff:10.0.0.1]/"):
        change_endpoints(system_sessions, organization, url=url)  # as if the operator had allowed it once
        answer = http.post(f"/v1/webhook_endpoints/{made.id}/test", json={"event_type": FAILED}).json()
        assert (answer["success"], answer["status_code"]) == (False, None)
        assert "does not lead to a public address" in answer["error"]


def test_a_disabled_endpoint_may_be_tested_and_stays_as_it_is(
    client: OpenAI, system_sessions: Sessions, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    client.webhooks.update(made.id, extra_body={"is_enabled": False})
    before = client.webhooks.retrieve(made.id)
    receiver.answer = answering(500)
    client.webhooks.test(made.id, event_type=FAILED)

    assert len(receiver.received) == 1
    assert client.webhooks.retrieve(made.id) == before
    assert endpoint_of(system_sessions, made.id).failures_in_a_row == 0


def test_no_transaction_waits_for_the_receiver(
    client: OpenAI, api_sessions: Sessions, receiver: Receiver, servers: Servers
) -> None:
    """Seen by the superuser: others are not shown who is in one."""
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    open_transactions = list[int]()

    def look(handler: BaseHTTPRequestHandler) -> None:
        with psycopg.connect(servers.superuser_dsn) as superuser:
            in_one = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'tunesmith_api' AND xact_start IS NOT NULL"
            open_transactions.extend(superuser.execute(in_one).fetchone() or ())
        answering(200)(handler)

    receiver.answer = look
    client.webhooks.test(made.id, event_type=FAILED)
    with api_sessions.begin() as session:
        session.execute(text("SELECT 1"))
        client.webhooks.test(made.id, event_type=FAILED)
    assert open_transactions == [0, 1]


def test_an_endpoint_is_sent_one_sample_at_a_time(client: OpenAI, stranger: OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    may_answer = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        may_answer.wait(10)
        answering(200)(handler)

    receiver.answer = answer
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.webhooks.test, made.id, event_type=FAILED)
        wait_until(lambda: bool(receiver.received))
        with pytest.raises(openai.RateLimitError) as refused:
            client.webhooks.test(made.id, event_type=FAILED)
        assert refused.value.code == "webhook_sample_in_flight"
        with pytest.raises(openai.NotFoundError):
            stranger.webhooks.test(made.id, event_type=FAILED)
        may_answer.set()
        assert first.result().success
    assert client.webhooks.test(made.id, event_type=FAILED).success
    assert len(receiver.received) == 2


@pytest.mark.parametrize("body", [{}, {"event_type": "batch.completed"}, {"event_type": None}, {"event_type": FAILED, "n": 1}])
def test_a_sample_of_what_is_not_told_is_refused(client: OpenAI, http: httpx.Client, body: dict[str, object]) -> None:
    made = client.webhooks.create(name="a", url="https://hooks.example.com/", event_types=[FAILED])

    assert http.post(f"/v1/webhook_endpoints/{made.id}/test", json=body).status_code == 400


def test_a_strangers_endpoint_is_not_tested(client: OpenAI, stranger: OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[FAILED])
    with pytest.raises(openai.NotFoundError):
        stranger.webhooks.test(made.id, event_type=FAILED)

    assert receiver.received == []
