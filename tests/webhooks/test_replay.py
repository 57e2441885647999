"""Sending again: one message or those of a time, with the same id and the same bytes, on a fresh schedule."""

import threading
import time
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import func, text, update

from app.accounts.caller import Caller
from app.models import WebhookDelivery
from app.webhooks import delivery_log
from app.webhooks.circuit import OPENS_AFTER
from app.webhooks.emit import EventType
from tests.embedded.patience import PATIENCE_SECONDS
from tests.webhooks.receiver import Receiver, answering
from tests.webhooks.steps import (
    PATIENT,
    Sessions,
    age,
    change,
    change_endpoints,
    deliver,
    emit_event,
    make_endpoint,
    relaying,
    rows_of,
    seconds_until,
    wait_until,
)


@pytest.fixture
def endpoint_path(api_sessions: Sessions, organization: Caller, receiver: Receiver) -> str:
    return f"/v1/webhook_endpoints/{make_endpoint(api_sessions, organization, receiver.url).id}"


def error_code(answer: httpx.Response) -> Any:
    assert answer.status_code in (400, 404), answer.text
    return answer.json()["error"]["code"]


def set_age(sessions: Sessions, row_id: str, age: timedelta) -> None:
    with sessions.begin() as session:
        mine = update(WebhookDelivery).where(WebhookDelivery.id == row_id)
        session.execute(mine.values(created_at=func.clock_timestamp() - age))


def test_a_delivered_message_is_sent_again_as_it_was(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    emit_event(system_sessions, organization)
    deliver(system_sessions)
    (row,) = rows_of(system_sessions, organization)
    answer = http.post(f"{endpoint_path}/deliveries/{row.id}/replay").json()

    assert (answer["id"], answer["status"], answer["attempts"], answer["delivered_at"]) == (row.id, "waiting", 0, None)
    assert deliver(system_sessions) == 1
    first, second = receiver.received
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, len(row.recent_attempts)) == (1, 2)


def test_an_exhausted_message_has_a_fresh_schedule(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    emit_event(system_sessions, organization)
    receiver.answer = answering(500)
    while deliver(system_sessions):
        age(system_sessions, organization)
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.next_attempt_at) == (10, None)
    http.post(f"{endpoint_path}/deliveries/{row.id}/replay")

    assert deliver(system_sessions) == 1  # at once, though the endpoint was resting
    (row,) = rows_of(system_sessions, organization)
    assert row.attempts == 1
    assert 1 < seconds_until(system_sessions, row.next_attempt_at) <= 5


def test_a_message_in_flight_is_not_sent_twice_at_once(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    emit_event(system_sessions, organization)
    (row,) = rows_of(system_sessions, organization)
    receiver.answer = receiver.hang
    with relaying(system_sessions, PATIENT), relaying(system_sessions, PATIENT):
        wait_until(lambda: bool(receiver.received))
        assert error_code(http.post(f"{endpoint_path}/deliveries/{row.id}/replay")) == "webhook_delivery_in_flight"
        assert http.post(f"{endpoint_path}/replay", json={"since": 0}).json()["replayed"] == 0
        time.sleep(1.2)  # both relays have looked again
        assert len(receiver.received) == 1

    age(system_sessions, organization)  # whoever held it is gone, and its lease is over
    assert http.post(f"{endpoint_path}/deliveries/{row.id}/replay").status_code == 200
    receiver.answer = answering(200)
    assert deliver(system_sessions) == 1


def test_one_who_held_a_message_too_long_does_not_speak_for_its_replay(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    emit_event(system_sessions, organization)
    (row,) = rows_of(system_sessions, organization)
    may_fail = threading.Event()

    def fail_late(handler: Any) -> None:
        may_fail.wait(PATIENCE_SECONDS)
        answering(500)(handler)

    receiver.answer = fail_late
    claims_one = {"is_leaving": lambda: bool(receiver.received)}
    late = threading.Thread(target=deliver, args=(system_sessions, PATIENT), kwargs=claims_one)
    late.start()
    wait_until(lambda: bool(receiver.received))
    change(system_sessions, organization, lease_expires_at=func.clock_timestamp() - timedelta(seconds=1))
    receiver.answer = answering(200)
    http.post(f"{endpoint_path}/deliveries/{row.id}/replay")
    change(system_sessions, organization, next_attempt_at=func.clock_timestamp() + timedelta(minutes=1))
    may_fail.set()
    late.join()

    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.last_status) == (0, None)


def test_a_range_is_replayed_by_its_time_and_by_what_failed(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    for status in (200, 500, 200, 500):
        receiver.answer = answering(status)
        emit_event(system_sessions, organization)
        deliver(system_sessions)
    rows = rows_of(system_sessions, organization)
    for hours, row in zip((4, 3, 2, 1), rows, strict=True):
        set_age(system_sessions, row.id, timedelta(hours=hours))
    receiver.answer, receiver.received[:] = answering(200), []
    now = int(time.time())

    def replayed(**body: Any) -> list[str]:
        answer = http.post(f"{endpoint_path}/replay", json=body).json()
        before = len(receiver.received)
        assert answer == {"object": "webhook_replay", "replayed": deliver(system_sessions)}
        return sorted(request.headers["webhook-id"] for request in receiver.received[before:])

    ids = [row.id for row in rows]
    assert replayed(since=now - 5 * 3600, only_failed=True) == [ids[1], ids[3]]
    assert replayed(since=now - 5 * 3600, only_failed=True) == []
    assert replayed(since=now - 3 * 3600 - 600, until=now - 3600 - 600) == [ids[1], ids[2]]
    assert replayed(since=now - 2 * 3600 - 600) == [ids[2], ids[3]]
    assert replayed(since=now + 3600) == []


def test_another_endpoints_messages_are_not_replayed(
    http: httpx.Client,
    api_sessions: Sessions,
    system_sessions: Sessions,
    organization: Caller,
    receiver: Receiver,
    endpoint_path: str,
) -> None:
    other = make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED)
    emit_event(system_sessions, organization, EventType.FAILED)
    deliver(system_sessions)
    (theirs,) = [row for row in rows_of(system_sessions, organization) if row.endpoint_id == other.id]

    assert error_code(http.post(f"{endpoint_path}/deliveries/{theirs.id}/replay")) == "webhook_delivery_not_found"
    assert http.post(f"{endpoint_path}/replay", json={"since": 0}).json()["replayed"] == 1


def test_a_replay_asks_a_resting_endpoint_at_once_with_one_probe(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver, endpoint_path: str
) -> None:
    for _ in range(OPENS_AFTER + 3):
        emit_event(system_sessions, organization)
    receiver.answer = answering(500)
    assert deliver(system_sessions) == OPENS_AFTER
    assert http.post(f"{endpoint_path}/replay", json={"since": 0}).json()["replayed"] == OPENS_AFTER + 3
    assert deliver(system_sessions) == 1

    receiver.answer = answering(200)
    http.post(f"{endpoint_path}/replay", json={"since": 0})
    assert deliver(system_sessions) == OPENS_AFTER + 3


def test_a_disabled_endpoint_is_enabled_first(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, endpoint_path: str
) -> None:
    emit_event(system_sessions, organization)
    (row,) = rows_of(system_sessions, organization)
    change_endpoints(system_sessions, organization, is_enabled=False)
    for answer in (
        http.post(f"{endpoint_path}/deliveries/{row.id}/replay"),
        http.post(f"{endpoint_path}/replay", json={"since": 0}),
    ):
        assert error_code(answer) == "webhook_endpoint_disabled"


def test_a_range_that_holds_too_many_is_refused_whole(
    http: httpx.Client,
    system_sessions: Sessions,
    organization: Caller,
    endpoint_path: str,
    client: OpenAI,
) -> None:
    made = client.webhooks.create(name="a", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.failed"])
    many = "INSERT INTO webhook_deliveries (id, event_id, organization_id, project_id, endpoint_id, event_type, body, attempts)"
    many += " SELECT 'msg_' || n, 'evt_' || n, :organization, :project, :endpoint, 'fine_tuning.job.failed', '{}', 0"
    many += " FROM generate_series(1, :count) AS n"
    owner = {"organization": organization.organization_id, "project": organization.project_id, "endpoint": made.id}
    with system_sessions.begin() as session:
        session.execute(text(many), owner | {"count": delivery_log.MAX_REPLAYED})
    path = f"/v1/webhook_endpoints/{made.id}/replay"
    assert http.post(path, json={"since": 0}).json()["replayed"] == delivery_log.MAX_REPLAYED

    emit_event(system_sessions, organization, EventType.FAILED)
    change(system_sessions, organization, attempts=3)
    answer = http.post(path, json={"since": 0})
    assert (error_code(answer), answer.json()["error"]["param"]) == ("too_many_webhook_deliveries", "since")
    assert {row.attempts for row in rows_of(system_sessions, organization)} == {3}


@pytest.mark.parametrize(
    "body", [{}, {"since": -1}, {"since": "now"}, {"since": 10**12}, {"since": 0, "until": 10**18}, {"since": 0, "all": True}]
)
def test_a_range_that_makes_no_sense_is_a_400(http: httpx.Client, endpoint_path: str, body: dict[str, Any]) -> None:
    assert http.post(f"{endpoint_path}/replay", json=body).status_code == 400
