"""Changing the secret: for a day the old one verifies too, if that is wished."""

from datetime import timedelta

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.webhooks import WebhookEndpointWithSecret
from sqlalchemy import func
from standardwebhooks import Webhook, WebhookVerificationError

from app.accounts.caller import Caller
from app.models import WebhookEndpoint
from app.webhooks import rotation
from tests.webhooks.receiver import Received, Receiver
from tests.webhooks.steps import Sessions, change_endpoints, deliver, emit_event, endpoint_of, seconds_until

SUCCEEDED = "fine_tuning.job.succeeded"


def accept(secret: str, request: Received) -> bool:
    """Whether both libraries do; they must agree."""
    try:
        Webhook(secret).verify(request.body, request.headers)
    except WebhookVerificationError:
        with OpenAI(api_key="none") as client, pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(request.body, request.headers, secret=secret)
        return False
    with OpenAI(api_key="none") as client:
        client.webhooks.unwrap(request.body, request.headers, secret=secret)
    return True


def next_request(sessions: Sessions, caller: Caller, receiver: Receiver) -> Received:
    emit_event(sessions, caller)
    deliver(sessions)
    return receiver.received[-1]


def test_during_the_overlap_old_and_new_verifiers_accept_and_then_only_new_ones(
    client: OpenAI, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[SUCCEEDED])
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert WebhookEndpointWithSecret.model_validate(rotated.model_dump())
    old, new = made.signing_secret, rotated.signing_secret
    assert old != new
    assert rotated.signing_secret_hint != made.signing_secret_hint
    expires_at = endpoint_of(system_sessions, made.id).previous_secret_expires_at
    assert 24 * 3600 - 60 < seconds_until(system_sessions, expires_at) <= 24 * 3600

    request = next_request(system_sessions, organization, receiver)
    assert request.headers["webhook-signature"].count("v1,") == 2
    assert (accept(old, request), accept(new, request)) == (True, True)

    over = func.clock_timestamp() - timedelta(seconds=1)
    change_endpoints(system_sessions, organization, previous_secret_expires_at=over)
    request = next_request(system_sessions, organization, receiver)
    assert (accept(old, request), accept(new, request)) == (False, True)

    with system_sessions.begin() as session:
        rotation.forget_old(session)
    forgotten = endpoint_of(system_sessions, made.id)
    assert (forgotten.previous_secret, forgotten.previous_secret_expires_at) == (None, None)
    assert accept(new, next_request(system_sessions, organization, receiver))


def test_without_an_overlap_the_old_secret_ends_at_once(
    client: OpenAI, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[SUCCEEDED])
    second = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True).signing_secret
    third = client.webhooks.rotate_secret(made.id).signing_secret

    request = next_request(system_sessions, organization, receiver)
    assert [accept(secret, request) for secret in (made.signing_secret, second, third)] == [False, False, True]


def test_a_message_that_waited_is_signed_with_what_is_valid_when_it_is_sent(
    client: OpenAI, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[SUCCEEDED])
    emit_event(system_sessions, organization)
    new = client.webhooks.rotate_secret(made.id).signing_secret
    deliver(system_sessions)

    (request,) = receiver.received
    assert (accept(made.signing_secret, request), accept(new, request)) == (False, True)


def test_a_secret_is_told_once(client: OpenAI) -> None:
    made = client.webhooks.create(name="a", url="https://hooks.example.com/", event_types=[SUCCEEDED])
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)

    shown = client.webhooks.retrieve(made.id).model_dump_json()
    assert made.signing_secret not in shown and rotated.signing_secret not in shown


def test_the_sdk_repeats_a_rotation_and_the_secret_that_receivers_know_stays_valid(
    client: OpenAI, http: httpx.Client, system_sessions: Sessions, organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="a", url=receiver.url, event_types=[SUCCEEDED])

    def rotate(**headers: str) -> str:
        path, body = f"/v1/webhook_endpoints/{made.id}/rotate_secret", {"keep_old_secret_active_for_24_hours": True}
        return str(http.post(path, json=body, headers=headers).json()["signing_secret"])

    repeated = {"x-stainless-retry-count": "1"}
    rotate()  # its client never hears of this
    new = rotate(**repeated)
    request = next_request(system_sessions, organization, receiver)
    assert (accept(made.signing_secret, request), accept(new, request)) == (True, True)

    earlier = WebhookEndpoint.previous_secret_expires_at - timedelta(minutes=6)
    change_endpoints(system_sessions, organization, previous_secret_expires_at=earlier)
    assert rotate(**repeated) != new  # the first try of this one was not heard of here
