"""Names whose answers change between two lookups, or hold what must not be reached, from a real name server."""

from collections.abc import Sequence

import pytest

from app.accounts.caller import Caller
from app.core.settings import WebhookSettings
from tests.webhooks.receiver import Receiver
from tests.webhooks.resolver import serving
from tests.webhooks.steps import LOOPBACK, Sessions, age, deliver, emit_event, make_endpoint, rows_of

PUBLIC = "93.184.216.34"


def test_a_name_is_looked_up_once_an_attempt_and_checked_at_each(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, f"http://hooks.example:{receiver.port}/hooks")
    emit_event(api_sessions, organization)
    with serving(["127.0.0.1"], ["10.0.0.1"]) as names:  # the second answer is ready for whoever asks again to connect
        deliver(system_sessions, resolve=names.resolve)
        assert (len(receiver.received), names.lookups) == (1, 1)

        emit_event(api_sessions, organization)
        deliver(system_sessions, resolve=names.resolve)
    assert (len(receiver.received), names.lookups) == (1, 2)
    assert "does not lead to a public address" in str(rows_of(system_sessions, organization)[1].last_error)


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        [PUBLIC, "127.0.0.1"],
        ["127.0.0.1", PUBLIC],
        [PUBLIC, "::1"],
        [PUBLIC, "::ffff:127.0.0.1"],
        [PUBLIC, "64:ff9b::7f00:1"],
        [PUBLIC, "2002:7f00:1::1"],
        [PUBLIC, "2001:0:4136:e378:8000:63bf:80ff:fffe"],
        [PUBLIC, "fd00::1"],
        ["169.254.169.254"],
        ["0.0.0.0"],
    ],
)
def test_a_name_that_leads_inside_is_refused_before_anything_is_sent(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver, answer: Sequence[str]
) -> None:
    make_endpoint(api_sessions, organization, f"http://hooks.example:{receiver.port}/hooks")
    emit_event(api_sessions, organization)
    with serving(answer) as names:
        deliver(system_sessions, WebhookSettings(), resolve=names.resolve)

    assert (receiver.received, names.lookups) == ([], 1)
    (row,) = rows_of(system_sessions, organization)
    assert (row.attempts, row.last_status) == (1, None)
    assert "does not lead to a public address" in str(row.last_error)


def test_a_name_that_leads_outside_again_is_delivered_to(
    api_sessions: Sessions, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    make_endpoint(api_sessions, organization, f"http://hooks.example:{receiver.port}/hooks")
    emit_event(api_sessions, organization)
    with serving(["10.0.0.1"], ["127.0.0.1"]) as names:
        deliver(system_sessions, LOOPBACK, resolve=names.resolve)
        assert receiver.received == []
        age(system_sessions, organization)
        deliver(system_sessions, LOOPBACK, resolve=names.resolve)
    assert len(receiver.received) == 1
