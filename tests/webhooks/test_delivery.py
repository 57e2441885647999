"""From the commit to the receiver: real Postgres, a real HTTP server, time passing by ageing rows."""

import asyncio
import json
import ssl
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import psycopg
import pytest
from openai import OpenAI
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.exc import NoResultFound, OperationalError
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from app import db, outbox
from app.accounts.caller import Caller
from app.core.settings import Settings, WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import delivery, guard, sending, signing
from app.webhooks import service as webhooks
from app.webhooks.circuit import MAX_PER_ENDPOINT, MAX_PER_ORGANIZATION
from app.webhooks.emit import EventType, emit
from app.webhooks.schemas import EndpointCreate
from tests.conftest import make_organization
from tests.embedded.patience import PATIENCE_SECONDS
from tests.webhooks.receiver import Receiver, answering, running
from tests.webhooks.steps import (
    HASTY,
    LOOPBACK,
    PATIENT,
    Sessions,
    age,
    change,
    deliver,
    emit_event,
    endpoint_of,
    make_endpoint,
    relaying,
    remove_deleted,
    rows_of,
    seconds_until,
    update_endpoint,
    wait_until,
)
from worker.embedded import Servers
from worker.embedded.roles import DATABASE

CERTIFICATE = Path(__file__).parent / "hooks.example.pem"  # self-signed for hooks.example, with its key, until 2126


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
        assert time.monotonic() - started > 0.4

    hung, dripped = rows_of(system_sessions, organization)
    assert (hung.last_status, dripped.last_status) == (None, 200)
    for row in (hung, dripped):
        assert (row.last_error, row.delivered_at) == ("no whole answer within 0.5 seconds", None)


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


def _break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"secret")


def _say_nothing(_: BaseHTTPRequestHandler) -> None:
    pass


def test_what_a_receiver_says_never_reaches_the_log_of_deliveries(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    for answer, status, error in (
        (_nonsense, None, "the answer is not HTTP/1.1"),
        (_say_nothing, None, "the receiver closed the connection without an answer"),
        (_break_off, 200, "the connection broke off"),
    ):
        receiver.answer = answer
        deliver(system_sessions)
        (row,) = rows_of(system_sessions, organization)
        assert (row.last_status, row.last_error) == (status, error)
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


def test_names_that_nobody_answers_for_keep_no_thread_from_others(receiver: Receiver) -> None:
    may_answer = threading.Event()

    def resolve(host: str) -> list[str]:
        if host == "silent.example":
            may_answer.wait(30)
        return ["127.0.0.1"]

    def to(host: str) -> sending.Message:
        return sending.Message("msg_1", f"http://{host}:{receiver.port}/hooks", (signing.new_secret(),), b"{}")

    async def run() -> list[sending.Outcome]:
        async with sending.open_client(LOOPBACK, resolve=resolve) as client:
            all_at_once = [sending.send(client, HASTY, to("silent.example")) for _ in range(sending.MAX_AT_ONCE)]
            given_up = await asyncio.gather(*all_at_once)  # their lookups go on
            heard = await sending.send(client, LOOPBACK, to("hooks.example"))
            may_answer.set()
            return [*given_up, heard]

    *given_up, heard = asyncio.run(run())
    assert {outcome.error for outcome in given_up} == {"no whole answer within 0.5 seconds"}
    assert heard.error is None


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


def test_a_receiver_that_ends_tls_after_the_handshake_is_a_failure_like_others(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=CERTIFICATE)
    server_tls.load_cert_chain(CERTIFICATE)
    server_tls.verify_mode = ssl.CERT_REQUIRED  # it asks who we are, and in TLS 1.3 says no once we have begun to send
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    with running(server_tls) as receiver, capture_logs() as logs:
        make_endpoint(api_sessions, organization, f"https://hooks.example:{receiver.port}/hooks")
        emit_event(api_sessions, organization)
        deliver(system_sessions, resolve=lambda _: ["127.0.0.1"], ssl_context=trusting)

    (row,) = rows_of(system_sessions, organization)
    assert (row.last_status, row.last_error) == (None, "the connection broke off")
    assert "webhook_failed_unexpectedly" not in {line["event"] for line in logs}


def test_only_enabled_endpoints_that_subscribed_are_told(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    told = make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED, EventType.SUCCEEDED)
    make_endpoint(api_sessions, organization, receiver.url, EventType.FAILED)
    disabled = make_endpoint(api_sessions, organization, receiver.url)
    update_endpoint(api_sessions, organization, disabled.id, is_enabled=False)
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
        update_endpoint(api_sessions, organization, endpoint.id, is_enabled=is_enabled)
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


def test_an_event_that_is_written_while_its_endpoint_is_deleted_goes_with_it(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    caller = {"organization_id": organization.organization_id, "project_id": organization.project_id}
    with db.organization_session(api_sessions, organization.organization_id) as session:
        emit(session, **caller, type=EventType.FAILED, data_id="ftjob-1")
        with db.organization_session(api_sessions, organization.organization_id) as deleting:
            webhooks.delete(deleting, organization, endpoint.id)

    assert deliver(system_sessions) == 0
    remove_deleted(system_sessions)
    assert rows_of(system_sessions, organization) == []
    with pytest.raises(NoResultFound):
        endpoint_of(system_sessions, endpoint.id)


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

    with relaying(system_sessions):
        wait_until(lambda: bool(receiver.received))
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
            is_delivered.wait(PATIENCE_SECONDS)
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
    deliver(system_sessions)  # unless the late one's own loop comes first
    wait_until(lambda: rows_of(system_sessions, organization)[0].delivered_at is not None)
    (delivered,) = rows_of(system_sessions, organization)
    is_delivered.set()
    late.join(PATIENCE_SECONDS)

    (row,) = rows_of(system_sessions, organization)
    assert row.delivered_at is not None
    assert (row.delivered_at, row.next_attempt_at, row.attempts) == (delivered.delivered_at, None, 1)


def test_five_hanging_receivers_of_twenty_slow_no_healthy_one(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    with ExitStack() as stack:
        receivers = [stack.enter_context(running()) for _ in range(20)]
        hanging, healthy = receivers[:5], receivers[5:]
        for receiver in hanging:
            receiver.answer = receiver.hang
            make_endpoint(api_sessions, organization, receiver.url)  # the oldest, so first in line
        for receiver in healthy:
            make_endpoint(api_sessions, organization, receiver.url)
        for _ in range(8):
            emit_event(api_sessions, organization)
        with relaying(system_sessions, PATIENT):
            wait_until(lambda: all(len(receiver.received) == 8 for receiver in healthy))
            wait_until(lambda: [receiver.at_once for receiver in hanging] == [MAX_PER_ENDPOINT] * 5)  # none has been given up
        assert all(receiver.most_at_once <= MAX_PER_ENDPOINT for receiver in receivers)


def test_an_organization_holds_a_share_of_the_places_however_many_endpoints_it_has(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    receiver.answer = receiver.hang
    for _ in range(MAX_PER_ORGANIZATION // MAX_PER_ENDPOINT + 2):
        make_endpoint(api_sessions, organization, receiver.url)
    for _ in range(MAX_PER_ENDPOINT):
        emit_event(api_sessions, organization)
    with relaying(system_sessions, PATIENT):
        wait_until(lambda: receiver.at_once == MAX_PER_ORGANIZATION)
        time.sleep(1.5)  # it has looked again
        with system_sessions.begin() as session:
            assert delivery.next_due_in(session) is None
    assert len(receiver.received) == MAX_PER_ORGANIZATION


def test_a_database_that_is_away_for_a_while_makes_nothing_come_twice(
    servers: Servers,
    settings: Settings,
    api_sessions: Sessions,
    system_sessions: Sessions,
    organization: Caller,
    receiver: Receiver,
) -> None:
    """It answers neither who claims, while a receiver takes its time, nor who settles then."""
    may_answer = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        may_answer.wait(PATIENCE_SECONDS)
        answering(200)(handler)

    receiver.answer = answer
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    hasty = db.open_sessions(settings.database.system_url, statement_seconds=1)
    relay = threading.Thread(target=deliver, args=(hasty, PATIENT))
    with psycopg.connect(servers.superuser_dsn, dbname=DATABASE) as away, capture_logs() as logs:
        relay.start()
        wait_until(lambda: bool(receiver.received))
        away.execute("LOCK TABLE webhook_endpoints IN ACCESS EXCLUSIVE MODE")
        time.sleep(2.5)
        may_answer.set()
        time.sleep(2.5)
        assert relay.is_alive()
        away.rollback()
        relay.join(PATIENCE_SECONDS)
    hasty.kw["bind"].dispose()

    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.delivered_at is None, row.lease_expires_at) == (1, False, None)
    assert len(receiver.received) == 1
    assert "webhook_unsettled" not in {line["event"] for line in logs}


def test_two_relays_share_the_work_and_the_places_of_an_endpoint(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller
) -> None:
    doubled = list[str]()
    held = set[str]()

    def take_a_while(handler: BaseHTTPRequestHandler) -> None:
        message_id = str(handler.headers["webhook-id"])
        if message_id in held:
            doubled.append(message_id)
        held.add(message_id)
        time.sleep(0.02)
        held.discard(message_id)
        answering(200)(handler)

    with ExitStack() as stack:
        receivers = [stack.enter_context(running()) for _ in range(5)]
        for receiver in receivers:
            receiver.answer = take_a_while
            make_endpoint(api_sessions, organization, receiver.url)
        for _ in range(12):
            emit_event(api_sessions, organization)
        with relaying(system_sessions), relaying(system_sessions):
            wait_until(lambda: all(row.delivered_at for row in rows_of(system_sessions, organization)))
        received = [request for receiver in receivers for request in receiver.received]
        assert len(received) == len({request.headers["webhook-id"] for request in received}) == 60
        assert doubled == []
        assert max(receiver.most_at_once for receiver in receivers) == MAX_PER_ENDPOINT  # of both relays together


def test_an_endpoint_in_another_relays_hands_is_left_to_it(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    endpoint = make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    with system_sessions.begin() as session:  # it claims or settles
        session.get(WebhookEndpoint, endpoint.id, with_for_update={"key_share": True})
        assert deliver(system_sessions) == 0
    assert deliver(system_sessions) == 1


def test_an_event_that_is_being_written_holds_up_no_delivery(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, receiver.url)
    emit_event(api_sessions, organization)
    caller = {"organization_id": organization.organization_id, "project_id": organization.project_id}
    with db.organization_session(api_sessions, organization.organization_id) as session:
        emit(session, **caller, type=EventType.FAILED, data_id="ftjob-2")
        assert deliver(system_sessions) == 1
    assert deliver(system_sessions) == 1


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
