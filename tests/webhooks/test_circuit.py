"""Endpoints that fail: asked by one message at a time, ever more seldom, and after five days no more."""

import json
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler

import pytest
from sqlalchemy import func
from structlog.testing import capture_logs

from app import db
from app.accounts.caller import Caller
from app.webhooks import circuit, delivery
from app.webhooks.circuit import FIRST_PAUSE, LONGEST_PAUSE, MAX_PER_ENDPOINT, OPENS_AFTER
from app.webhooks.emit import EventType, emit
from tests.webhooks.receiver import Receiver, answering
from tests.webhooks.steps import (
    PATIENT,
    Sessions,
    change_endpoints,
    deliver,
    emit_event,
    endpoint_of,
    make_endpoint,
    relaying,
    rows_of,
    seconds_until,
    update_endpoint,
    wait_until,
)

PAST = func.clock_timestamp() - timedelta(seconds=1)


def rest(sessions: Sessions, caller: Caller) -> None:
    """Let the time pass until the endpoints are asked again."""
    change_endpoints(sessions, caller, not_before=PAST)


@pytest.fixture
def no_second_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a test, however long that takes."""
    monkeypatch.setattr(delivery, "RETRY_DELAYS", (timedelta(hours=1),) * len(delivery.RETRY_DELAYS))


@pytest.mark.usefixtures("no_second_attempts")
def test_a_dead_receiver_costs_one_attempt_an_interval_and_messages_keep_theirs(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    for _ in range(30):
        emit_event(api_sessions, organization)
    receiver.answer = answering(500)

    began_at = time.monotonic()
    assert deliver(system_sessions) == OPENS_AFTER
    for probes in range(1, 9):
        failing = endpoint_of(system_sessions, endpoint.id)
        assert failing.failures_in_a_row == OPENS_AFTER + probes - 1
        pause = min(FIRST_PAUSE * 2 ** (probes - 1), LONGEST_PAUSE).total_seconds()
        assert pause + began_at - time.monotonic() <= seconds_until(system_sessions, failing.not_before) <= pause
        assert deliver(system_sessions) == 0
        with system_sessions.begin() as session:
            assert delivery.next_due_in(session) is None  # else the relay would look again and again
        rest(system_sessions, organization)
        began_at = time.monotonic()
        assert deliver(system_sessions) == 1

    assert len(receiver.received) == OPENS_AFTER + 8
    rows = rows_of(system_sessions, organization)
    assert sum(row.attempts for row in rows) == OPENS_AFTER + 8  # none was counted that was not made
    assert max(row.attempts for row in rows) == 1  # who failed waits for its own time, and another is the next probe


@pytest.mark.usefixtures("no_second_attempts")
def test_the_first_success_lets_the_backlog_flow(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    for _ in range(30):
        emit_event(api_sessions, organization)
    receiver.answer = answering(500)
    deliver(system_sessions)
    probes = len(receiver.received) + 1

    def wait_for_company(handler: BaseHTTPRequestHandler) -> None:
        if len(receiver.received) > probes:
            wait_until(lambda: receiver.most_at_once == MAX_PER_ENDPOINT)
        answering(200)(handler)

    receiver.answer, receiver.most_at_once = wait_for_company, 0
    rest(system_sessions, organization)
    assert deliver(system_sessions, PATIENT) == 30 - OPENS_AFTER

    closed = endpoint_of(system_sessions, endpoint.id)
    assert (closed.failing_since, closed.failures_in_a_row, closed.not_before) == (None, 0, None)
    assert receiver.most_at_once == MAX_PER_ENDPOINT


def test_two_relays_send_one_probe(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    for _ in range(10):
        emit_event(api_sessions, organization)
    change_endpoints(system_sessions, organization, failures_in_a_row=OPENS_AFTER, failing_since=PAST, not_before=PAST)
    receiver.answer = receiver.hang
    with relaying(system_sessions, PATIENT), relaying(system_sessions, PATIENT):
        wait_until(lambda: bool(receiver.received))
        time.sleep(1.5)  # both have looked again

    assert len(receiver.received) == 1


def test_an_endpoint_that_fails_keeps_nothing_from_others(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    resting = make_endpoint(api_sessions, organization, "http://127.0.0.1:9/")
    for _ in range(200):
        emit_event(api_sessions, organization)
    change_endpoints(system_sessions, organization, failures_in_a_row=9, not_before=func.clock_timestamp() + timedelta(hours=1))
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)

    assert deliver(system_sessions) == 1
    assert len(receiver.received) == 1
    assert not any(row.attempts for row in rows_of(system_sessions, organization) if row.endpoint_id == resting.id)


def test_pauses_grow_to_a_bound() -> None:
    pauses = [circuit.pause_after(failures) for failures in range(OPENS_AFTER, 10_000)]

    assert pauses[:4] == [FIRST_PAUSE * 2**n for n in range(4)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


@pytest.mark.parametrize(("days", "is_enabled"), [(4.99, True), (5.01, False)])
def test_five_days_of_failure_disable_an_endpoint_and_the_others_are_told(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver, days: float, is_enabled: bool
) -> None:
    failing = make_endpoint(api_sessions, organization, "http://127.0.0.1:9/")
    for _ in range(3):
        emit_event(api_sessions, organization)
    change_endpoints(
        system_sessions,
        organization,
        failures_in_a_row=700,
        failing_since=func.clock_timestamp() - timedelta(days=days),
    )
    other = make_endpoint(api_sessions, organization, receiver.url)
    make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED)
    with capture_logs() as logs:
        deliver(system_sessions)

    found = endpoint_of(system_sessions, failing.id)
    assert found.is_enabled is is_enabled
    told = [line["endpoint"] for line in logs if line["event"] == "webhook_endpoint_disabled"]
    if is_enabled:
        assert (found.disabled_at, found.disabled_reason, told, receiver.received) == (None, None, [], [])
        return
    assert (found.disabled_reason, told) == ("failing", [failing.id])
    assert -5 < seconds_until(system_sessions, found.disabled_at) <= 0
    (notice,) = receiver.received
    assert (json.loads(notice.body)["type"], json.loads(notice.body)["data"]) == ("webhook_endpoint.disabled", {"id": failing.id})
    rows = rows_of(system_sessions, organization)
    assert [row.event_type for row in rows if row.endpoint_id == other.id] == ["webhook_endpoint.disabled"]
    waited = [row for row in rows if row.endpoint_id == failing.id]
    assert sorted(row.attempts for row in waited) == [0, 0, 1]
    assert all(row.next_attempt_at is None and row.delivered_at is None for row in waited)


def test_enabling_begins_with_a_clean_slate(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    change_endpoints(
        system_sessions,
        organization,
        failures_in_a_row=700,
        failing_since=func.clock_timestamp() - timedelta(days=6),
        not_before=func.clock_timestamp() + timedelta(minutes=10),
        is_enabled=False,
        disabled_at=PAST,
        disabled_reason="failing",
    )
    update_endpoint(api_sessions, organization, endpoint.id, is_enabled=True)
    emit_event(api_sessions, organization)
    receiver.answer = answering(500)

    assert deliver(system_sessions) == 1  # and a failure does not disable it at once
    again = endpoint_of(system_sessions, endpoint.id)
    assert (again.is_enabled, again.disabled_at, again.disabled_reason, again.failures_in_a_row) == (True, None, None, 1)


def test_an_event_written_while_its_endpoint_is_given_up_is_not_sent_days_later(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    failing_since = func.clock_timestamp() - timedelta(days=6)
    change_endpoints(system_sessions, organization, failures_in_a_row=700, failing_since=failing_since)
    receiver.answer = answering(500)
    caller = {"organization_id": organization.organization_id, "project_id": organization.project_id}
    with db.organization_session(api_sessions, organization.organization_id) as session:
        emit(session, **caller, type=EventType.FAILED, data_id="ftjob-2")
        assert deliver(system_sessions) == 1
    assert endpoint_of(system_sessions, endpoint.id).disabled_reason == "failing"

    update_endpoint(api_sessions, organization, endpoint.id, is_enabled=True)
    assert deliver(system_sessions) == 0
    assert [row.next_attempt_at for row in rows_of(system_sessions, organization)] == [None, None]


@pytest.mark.usefixtures("no_second_attempts")
def test_a_new_url_is_asked_at_once(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, "http://127.0.0.1:9/")
    for _ in range(OPENS_AFTER + 2):
        emit_event(api_sessions, organization)
    assert deliver(system_sessions) == OPENS_AFTER
    update_endpoint(api_sessions, organization, endpoint.id, url=receiver.url)

    assert deliver(system_sessions) == 2
    assert len(receiver.received) == 2
