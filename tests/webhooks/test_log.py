"""The log of deliveries: what was sent, how each attempt went, and for how long that is kept."""

import json
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import func

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.webhooks import delivery_log
from app.webhooks.delivery import ATTEMPTS_KEPT
from app.webhooks.emit import EventType
from tests.embedded.patience import eventually
from tests.webhooks.receiver import Receiver, answering
from tests.webhooks.steps import (
    Sessions,
    age,
    change,
    change_endpoints,
    deliver,
    emit_event,
    endpoint_of,
    make_endpoint,
    relay_process,
    rows_of,
)


@pytest.fixture
def log_path(api_sessions: Sessions, organization: Caller, receiver: Receiver) -> str:
    return f"/v1/webhook_endpoints/{make_endpoint(api_sessions, organization, receiver.url).id}/deliveries"


def test_the_log_is_asked_by_status_and_by_event_type(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, log_path: str
) -> None:
    def ids(**filters: str) -> list[str]:
        return [shown["id"] for shown in http.get(log_path, params=filters).json()["data"]]

    receiver.answer = answering(500)
    emit_event(system_sessions, organization, EventType.CREATED)
    deliver(system_sessions)
    (exhausted,) = rows_of(system_sessions, organization)
    change(system_sessions, organization, next_attempt_at=None)
    emit_event(system_sessions, organization, EventType.FAILED)
    deliver(system_sessions)
    receiver.answer = answering(200)
    emit_event(system_sessions, organization, EventType.FAILED)
    deliver(system_sessions)
    _, waiting, delivered = rows_of(system_sessions, organization)

    assert ids() == [delivered.id, waiting.id, exhausted.id]
    for row, status in ((delivered, "delivered"), (waiting, "waiting"), (exhausted, "exhausted")):
        assert ids(status=status) == [row.id]
        assert http.get(f"{log_path}/{row.id}").json()["status"] == status
    assert ids(event_type="fine_tuning.job.failed") == [delivered.id, waiting.id]
    assert ids(event_type="fine_tuning.job.failed", status="waiting") == [waiting.id]
    assert ids(event_type="fine_tuning.job.succeeded") == []
    for wrong in ({"status": "lost"}, {"event_type": "batch.completed"}):
        assert http.get(log_path, params=wrong).status_code == 400


def test_one_delivery_is_shown_with_its_bytes_and_its_last_attempts(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, log_path: str
) -> None:
    emit_event(system_sessions, organization, data_id="ftjob-7")
    for status in (500, 200):
        receiver.answer = answering(status)
        deliver(system_sessions)
        age(system_sessions, organization)
    (row,) = rows_of(system_sessions, organization)
    shown: dict[str, Any] = http.get(f"{log_path}/{row.id}").json()

    assert shown["body"].encode() == receiver.received[0].body
    assert json.loads(shown["body"])["data"] == {"id": "ftjob-7"}
    failed, taken = shown["recent_attempts"]
    assert (failed["status"], failed["error"]) == (500, "the receiver answered 500")
    assert (taken["status"], taken["error"]) == (200, None)
    assert shown["created_at"] <= failed["at"] <= taken["at"] <= shown["created_at"] + 10
    assert 0 <= taken["milliseconds"] < 5000
    assert http.get(f"{log_path}/msg_none").json()["error"]["code"] == "webhook_delivery_not_found"


def test_the_last_ten_attempts_are_kept(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, log_path: str
) -> None:
    emit_event(system_sessions, organization)
    for status in range(500, 503 + ATTEMPTS_KEPT):
        receiver.answer = answering(status)
        change(system_sessions, organization, attempts=0)
        age(system_sessions, organization)
        deliver(system_sessions)

    (row,) = rows_of(system_sessions, organization)
    shown = http.get(f"{log_path}/{row.id}").json()["recent_attempts"]
    assert [attempt["status"] for attempt in shown] == list(range(503, 503 + ATTEMPTS_KEPT))


def test_what_is_a_month_old_and_waits_no_more_is_forgotten(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, log_path: str
) -> None:
    for _ in range(4):
        emit_event(system_sessions, organization)
    young, delivered, exhausted, waiting = rows_of(system_sessions, organization)
    month = delivery_log.KEPT + timedelta(minutes=1)
    with system_sessions.begin() as session:
        for row in (young, delivered, exhausted, waiting):
            session.add(row)
            row.created_at = func.clock_timestamp() - (timedelta(days=29) if row is young else month)
            if row is not waiting:
                row.next_attempt_at = None
        delivered.delivered_at = func.clock_timestamp()
    with system_sessions.begin() as session:
        delivery_log.remove_old(session)

    assert [row.id for row in rows_of(system_sessions, organization)] == sorted([young.id, waiting.id])


def test_the_relay_does_the_forgetting(
    client: OpenAI, settings: Settings, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=["fine_tuning.job.failed"])
    client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    over = func.clock_timestamp() - timedelta(seconds=1)
    change_endpoints(system_sessions, organization, previous_secret_expires_at=over)
    emit_event(system_sessions, organization, EventType.FAILED)
    change(system_sessions, organization, created_at=over - delivery_log.KEPT, next_attempt_at=None)
    with relay_process(settings):
        eventually(lambda: not rows_of(system_sessions, organization))
        eventually(lambda: endpoint_of(system_sessions, made.id).previous_secret is None)
