"""From the commit to the receiver: real Postgres, a real HTTP server, time passing by ageing rows."""

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psycopg
import pytest
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import func, orm, select, update
from sqlalchemy.exc import OperationalError
from standardwebhooks import Webhook

from app import db, outbox
from app.accounts.caller import Caller
from app.core.settings import Settings, WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import delivery, guard
from app.webhooks import service as webhooks
from app.webhooks.emit import EventType, emit
from app.webhooks.schemas import EndpointCreate, EndpointUpdate
from tests.conftest import make_organization
from tests.webhooks.receiver import Receiver, answering, running

Sessions = orm.sessionmaker[orm.Session]

LOOPBACK = WebhookSettings(allow_loopback=True)
HASTY = WebhookSettings(allow_loopback=True, timeout_seconds=0.5)
CERTIFICATE = Path(__file__).parent / "hooks.example.pem"  # self-signed for hooks.example, with its key, until 2126


def make_endpoint(sessions: Sessions, caller: Caller, url: str, *types: EventType) -> WebhookEndpoint:
    with sessions.begin() as session:
        db.use_organization(session, caller.organization_id)
        request = EndpointCreate(url=url, event_types=list(types or EventType))
        return webhooks.create(session, caller, request=request, settings=LOOPBACK)


def emit_event(sessions: Sessions, caller: Caller, type: EventType = EventType.SUCCEEDED, *, data_id: str = "ftjob-1") -> None:
    with sessions.begin() as session:
        db.use_organization(session, caller.organization_id)
        emit(session, organization_id=caller.organization_id, project_id=caller.project_id, type=type, data_id=data_id)


def deliver(sessions: Sessions, settings: WebhookSettings = LOOPBACK, **how: Any) -> int:
    """What the relay does when it wakes up. Returns how many attempts were made."""

    async def run() -> int:
        async with delivery.open_client(settings, **how) as client:
            return await delivery.deliver_due(sessions, client, settings)

    return asyncio.run(run())


def rows_of(sessions: Sessions, caller: Caller) -> list[WebhookDelivery]:
    with sessions.begin() as session:
        mine = select(WebhookDelivery).where(WebhookDelivery.organization_id == caller.organization_id)
        return list(session.scalars(mine.order_by(WebhookDelivery.id)))


def change(sessions: Sessions, caller: Caller, **values: Any) -> None:
    with sessions.begin() as session:
        mine = update(WebhookDelivery).where(WebhookDelivery.organization_id == caller.organization_id)
        session.execute(mine.values(**values))


def age(sessions: Sessions, caller: Caller) -> None:
    """Let the time pass until the next attempt."""
    change(sessions, caller, next_attempt_at=func.clock_timestamp() - timedelta(milliseconds=1))


def seconds_until(sessions: Sessions, instant: datetime | None) -> float:
    assert instant is not None
    with sessions.begin() as session:
        return (instant - session.scalars(select(func.clock_timestamp())).one()).total_seconds()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_event_arrives_signed_and_both_libraries_accept_it(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, f"{receiver.url}?team=a")
    emit_event(api_sessions, organization, data_id="ftjob-7")
    assert receiver.received == []  # nothing is sent from inside a request

    assert deliver(system_sessions) == 1

    (request,) = receiver.received
    assert request.path == "/hooks?team=a"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    event = json.loads(request.body)
    assert Webhook(endpoint.secret).verify(request.body, request.headers) == event
    assert event.keys() == {"id", "object", "created_at", "type", "data"}
    assert (event["object"], event["type"], event["data"]) == ("event", "fine_tuning.job.succeeded", {"id": "ftjob-7"})
    with OpenAI(api_key="none") as client:
        unwrapped = client.webhooks.unwrap(request.body, request.headers, secret=endpoint.secret)
    assert (unwrapped.id, unwrapped.data.id) == (event["id"], "ftjob-7")
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.last_status, row.last_error, row.next_attempt_at) == (1, 200, None, None)
    assert row.delivered_at is not None
    assert deliver(system_sessions) == 0


@pytest.mark.parametrize("type", EventType)
def test_the_sdk_unwraps_every_type(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver, type: EventType
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url, type)
    emit_event(api_sessions, organization, type)
    deliver(system_sessions)

    (request,) = receiver.received
    with OpenAI(api_key="none") as client:
        assert client.webhooks.unwrap(request.body, request.headers, secret=endpoint.secret).type == type.value


def test_a_failed_attempt_is_repeated_with_the_same_id_and_the_same_bytes(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    receiver.answer = answering(500)
    deliver(system_sessions)
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.last_status, row.last_error) == (1, 500, "the receiver answered 500")
    assert deliver(system_sessions) == 0  # not before its time

    receiver.answer = answering(204)
    age(system_sessions, organization)
    time.sleep(1.1)  # signatures tell whole seconds
    assert deliver(system_sessions) == 1

    first, second = receiver.received
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])
    assert first.headers["webhook-id"] == row.id
    assert int(second.headers["webhook-timestamp"]) > int(first.headers["webhook-timestamp"])
    assert Webhook(endpoint.secret).verify(second.body, second.headers)
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.last_status, row.last_error) == (2, 204, None)


def test_attempts_follow_the_schedule_and_end(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    receiver.answer = answering(503)
    minute, hour = 60, 3600

    for delay in (5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour):
        assert deliver(system_sessions) == 1
        (row,) = rows_of(system_sessions, organization)
        assert delay - 4 < seconds_until(system_sessions, row.next_attempt_at) <= delay
        age(system_sessions, organization)
    assert deliver(system_sessions) == 1

    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.next_attempt_at, row.delivered_at) == (10, None, None)
    assert deliver(system_sessions) == 0
    assert len({request.body for request in receiver.received}) == 1
    assert len(receiver.received) == 10


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_not_followed(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver, status: int
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    receiver.answer = answering(status, Location=f"http://127.0.0.1:{receiver.port}/elsewhere")
    deliver(system_sessions)

    assert [request.path for request in receiver.received] == ["/hooks"]
    (row,) = rows_of(system_sessions, organization)
    assert (row.last_status, row.delivered_at) == (status, None)
    assert "redirects are not followed" in str(row.last_error)


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b".")
        time.sleep(0.05)


def test_a_receiver_that_hangs_or_drips_is_given_up(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    for answer in (receiver.hang, _drip):
        receiver.answer = answer
        emit_event(api_sessions, organization)
        started = time.monotonic()
        assert deliver(system_sessions, HASTY) == 1
        assert 0.4 < time.monotonic() - started < 3

    for row in rows_of(system_sessions, organization):
        assert (row.last_status, row.last_error) == (None, "no whole answer within 0.5 seconds")


def test_a_long_answer_is_read_no_further_than_the_limit(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    sent_bytes = 0

    def pour(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent_bytes
        handler.send_response(200)
        handler.end_headers()
        while sent_bytes < 512 * 1024 * 1024:
            sent_bytes += handler.wfile.write(b"x" * 65536)

    receiver.answer = pour
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    deliver(system_sessions)

    wait_until(lambda: receiver.at_once == 0)
    assert sent_bytes < 64 * 1024 * 1024  # what the kernel's buffers took, for nobody read it
    (row,) = rows_of(system_sessions, organization)
    assert row.delivered_at is not None


def _nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-secret\r\n\r\n")


def test_what_a_receiver_says_never_reaches_the_log_of_deliveries(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    for answer, error in ((_nonsense, "the answer is not HTTP/1.1"), (lambda _: None, "the answer is not HTTP/1.1")):
        receiver.answer = answer
        deliver(system_sessions)
        (row,) = rows_of(system_sessions, organization)
        assert (row.last_status, row.last_error) == (None, error)
        age(system_sessions, organization)


def test_nobody_listening_is_a_failure(api_sessions: Sessions, system_sessions: Sessions, organization: Caller) -> None:
    with running() as gone:
        make_endpoint(api_sessions, organization, gone.url)
    emit_event(api_sessions, organization)
    deliver(system_sessions)

    (row,) = rows_of(system_sessions, organization)
    assert row.attempts == 1
    assert str(row.last_error).startswith("could not connect")


def test_a_closed_address_is_a_failed_attempt_that_says_why(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)  # made when loopback was still allowed
    make_endpoint(api_sessions, organization, f"http://hooks.example:{receiver.port}/hooks")
    emit_event(api_sessions, organization)
    deliver(system_sessions, WebhookSettings(), resolve=lambda _: ["8.8.8.8", "127.0.0.1"])

    assert receiver.received == []
    for row in rows_of(system_sessions, organization):
        assert (row.attempts, row.last_status) == (1, None)
        assert "does not lead to a public address" in str(row.last_error)


def test_the_name_is_resolved_once_an_attempt_and_kept_in_the_host_header(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, f"http://hooks.example:{receiver.port}/hooks")
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    emit_event(api_sessions, organization)
    deliver(system_sessions, resolve=lambda _: answers.pop(0))

    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"
    assert answers == [["10.0.0.1"]]

    emit_event(api_sessions, organization)
    deliver(system_sessions, resolve=lambda _: answers.pop(0))  # moved since: checked again
    assert len(receiver.received) == 1


def test_tls_is_verified_for_the_name_though_the_address_is_connected_to(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    names = list[str | None]()
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(CERTIFICATE)
    server_tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    with running(server_tls) as receiver:
        for name, type in (("hooks.example", EventType.CREATED), ("other.example", EventType.STARTED)):
            make_endpoint(api_sessions, organization, f"https://{name}:{receiver.port}/hooks", type)
            emit_event(api_sessions, organization, type)
        deliver(system_sessions, resolve=lambda _: ["127.0.0.1"], ssl_context=trusting)
        rightly_named, wrongly_named = rows_of(system_sessions, organization)
        assert [request.headers["host"] for request in receiver.received] == [f"hooks.example:{receiver.port}"]
        assert sorted(map(str, names)) == ["hooks.example", "other.example"]
        assert rightly_named.delivered_at is not None
        assert "certificate" in str(wrongly_named.last_error)

        age(system_sessions, organization)
        change(system_sessions, organization, delivered_at=None)
        deliver(system_sessions, resolve=lambda _: ["127.0.0.1"])  # nobody vouches for the certificate any more
        assert len(receiver.received) == 1


def test_only_enabled_endpoints_that_subscribed_are_told(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    told = make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED, EventType.SUCCEEDED)
    make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED)
    disabled = make_endpoint(api_sessions, organization, receiver.url)
    with api_sessions.begin() as session:
        db.use_organization(session, organization.organization_id)
        webhooks.update(session, organization, disabled.id, request=EndpointUpdate(is_enabled=False), settings=LOOPBACK)
    other_project = Caller("key_x", organization.organization_id, "proj_other", organization.organization_slug)
    make_endpoint(api_sessions, other_project, receiver.url)
    emit_event(api_sessions, organization)

    assert [row.endpoint_id for row in rows_of(system_sessions, organization)] == [told.id]
    assert deliver(system_sessions) == 1


def test_an_endpoint_disabled_meanwhile_gets_nothing_until_it_is_enabled(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    for is_enabled, attempts in ((False, 0), (True, 1)):
        with api_sessions.begin() as session:
            db.use_organization(session, organization.organization_id)
            request = EndpointUpdate(is_enabled=is_enabled)
            webhooks.update(session, organization, endpoint.id, request=request, settings=LOOPBACK)
        with system_sessions.begin() as session:
            assert delivery.next_due_in(session) == (0 if is_enabled else None)
        assert deliver(system_sessions) == attempts


def test_an_event_of_a_transaction_that_fails_was_never_there(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    with pytest.raises(RuntimeError), api_sessions.begin() as session:
        db.use_organization(session, organization.organization_id)
        caller = {"organization_id": organization.organization_id, "project_id": organization.project_id}
        emit(session, **caller, type=EventType.FAILED, data_id="ftjob-1")
        raise RuntimeError

    assert rows_of(system_sessions, organization) == []


def test_an_endpoint_deleted_while_an_event_is_written_waits_for_it(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)

    def delete() -> None:
        with api_sessions.begin() as session:
            db.use_organization(session, organization.organization_id)
            webhooks.delete(session, organization, endpoint.id)

    deleter = threading.Thread(target=delete)
    with api_sessions.begin() as session:
        db.use_organization(session, organization.organization_id)
        caller = {"organization_id": organization.organization_id, "project_id": organization.project_id}
        emit(session, **caller, type=EventType.FAILED, data_id="ftjob-1")
        deleter.start()
        deleter.join(0.2)
        assert deleter.is_alive()
    deleter.join(10)

    assert rows_of(system_sessions, organization) == []


def test_the_commit_wakes_the_relay(settings: Settings, api_sessions: Sessions, organization: Caller, receiver: Receiver) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    url = settings.database.system_url.get_secret_value().replace("postgresql+psycopg", "postgresql", 1)
    with psycopg.connect(url, autocommit=True) as relay:
        relay.execute(f"LISTEN {outbox.CHANNEL}")
        emit_event(api_sessions, organization)
        assert len(list(relay.notifies(timeout=5, stop_after=1))) == 1


def test_what_a_crash_left_in_flight_is_sent_again_with_the_same_id(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    receiver.answer = receiver.hang

    async def die_while_sending() -> None:
        async with delivery.open_client(LOOPBACK) as client:
            relay = asyncio.create_task(delivery.deliver_due(system_sessions, client, LOOPBACK))
            await asyncio.to_thread(wait_until, lambda: bool(receiver.received))
            relay.cancel()
            await asyncio.wait([relay])

    asyncio.run(die_while_sending())
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.delivered_at) == (0, None)
    assert 50 < seconds_until(system_sessions, row.next_attempt_at) <= 60
    assert deliver(system_sessions) == 0  # somebody may still hold it

    receiver.answer = answering(200)
    age(system_sessions, organization)
    assert deliver(system_sessions) == 1
    first, second = receiver.received
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


def test_a_failure_that_comes_late_does_not_undo_a_delivery(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    is_delivered = threading.Event()

    def fail_the_first_late(handler: BaseHTTPRequestHandler) -> None:
        if len(receiver.received) == 1:
            is_delivered.wait(10)
            answering(500)(handler)
        else:
            answering(200)(handler)

    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    receiver.answer = fail_the_first_late
    late = threading.Thread(target=deliver, args=(system_sessions,))
    late.start()
    wait_until(lambda: bool(receiver.received))
    age(system_sessions, organization)  # its lease ran out
    assert deliver(system_sessions) == 1
    (delivered,) = rows_of(system_sessions, organization)
    is_delivered.set()
    late.join(10)

    (row,) = rows_of(system_sessions, organization)
    assert row.delivered_at is not None
    assert (row.delivered_at, row.next_attempt_at, row.attempts) == (delivered.delivered_at, None, 1)


def test_a_hanging_endpoint_holds_up_nobody_else(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    with running() as hanging:
        hanging.answer = hanging.hang
        slow = make_endpoint(api_sessions, organization, hanging.url, EventType.STARTED)
        fast = make_endpoint(api_sessions, organization, receiver.url, EventType.CREATED)
        for _ in range(9):
            emit_event(api_sessions, organization, EventType.STARTED)  # older, so first in line
        for _ in range(40):
            emit_event(api_sessions, organization, EventType.CREATED)
        settings = WebhookSettings(allow_loopback=True, timeout_seconds=1)
        assert deliver(system_sessions, settings) == 49

    rows = rows_of(system_sessions, organization)
    assert all(row.attempts == 1 for row in rows)
    taken = [row.delivered_at for row in rows if row.endpoint_id == fast.id and row.delivered_at]
    assert len(taken) == 40
    assert max(taken) - min(taken) < timedelta(seconds=2)  # the slow ones took three turns of a second each
    assert not any(row.delivered_at for row in rows if row.endpoint_id == slow.id)
    assert hanging.most_at_once == 4
    assert receiver.most_at_once <= 4


def test_two_relays_share_the_work(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    for _ in range(5):
        make_endpoint(api_sessions, organization, receiver.url)
    for _ in range(12):
        emit_event(api_sessions, organization)
    relays = [threading.Thread(target=deliver, args=(system_sessions,)) for _ in range(2)]
    for relay in relays:
        relay.start()
    for relay in relays:
        relay.join()

    assert len(receiver.received) == len({request.headers["webhook-id"] for request in receiver.received}) == 60
    assert all(row.delivered_at for row in rows_of(system_sessions, organization))


def test_the_relay_knows_how_long_it_may_sleep(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    def next_due_in() -> float | None:
        with system_sessions.begin() as session:
            return delivery.next_due_in(session)

    make_endpoint(api_sessions, organization, receiver.url)
    assert next_due_in() is None
    emit_event(api_sessions, organization)
    assert next_due_in() == 0
    receiver.answer = answering(500)
    deliver(system_sessions)
    assert 1 < (next_due_in() or 0) <= 5


def test_a_database_that_is_down_is_told_to_the_relay() -> None:
    nowhere = db.open_sessions(SecretStr("postgresql+psycopg://nobody@127.0.0.1:1/none"))
    with pytest.raises(OperationalError):
        deliver(nowhere)


def test_another_organization_sees_neither_endpoints_nor_deliveries(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    """Row-level security, for the day on which a query forgets its organization."""
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    stranger = make_organization(system_sessions)

    def visible_to(caller: Caller | None) -> list[int]:
        with api_sessions.begin() as session:
            if caller:
                db.use_organization(session, caller.organization_id)
            tables = (WebhookEndpoint, WebhookDelivery)
            return [session.scalars(select(func.count()).select_from(table)).one() for table in tables]

    assert visible_to(organization) == [1, 1]
    assert visible_to(stranger) == [0, 0]
    assert visible_to(None) == [0, 0]
    with pytest.raises(guard.UrlRefused), api_sessions.begin() as session:
        db.use_organization(session, stranger.organization_id)
        webhooks.create(session, stranger, request=EndpointCreate(url="http://10.0.0.1"), settings=LOOPBACK)
