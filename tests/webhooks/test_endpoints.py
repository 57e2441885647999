"""Webhook endpoints through the SDK's own resource."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.webhooks import WebhookEndpoint, WebhookEndpointWithSecret
from sqlalchemy import orm, text

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.webhooks import delivery_log
from app.webhooks.emit import EventType
from app.webhooks.service import MAX_ENDPOINTS
from tests.webhooks.receiver import Receiver, answering
from tests.webhooks.steps import deliver, emit_event, rows_of

URL = "https://hooks.example.com/tunesmith"
SUCCEEDED, FAILED = "fine_tuning.job.succeeded", "fine_tuning.job.failed"


def test_the_sdk_creates_changes_and_deletes_an_endpoint(client: OpenAI) -> None:
    made = client.webhooks.create(name="mine", url=URL, event_types=[SUCCEEDED])
    assert WebhookEndpointWithSecret.model_validate(made.model_dump())  # the SDK's own type, without its lenience
    assert made.signing_secret.startswith("whsec_")
    assert (made.name, made.url, made.event_types) == ("mine", URL, [SUCCEEDED])

    got = client.webhooks.retrieve(made.id)
    assert WebhookEndpoint.model_validate(got.model_dump())
    assert not hasattr(got, "signing_secret")
    assert got.signing_secret_hint is not None
    assert made.signing_secret not in got.model_dump_json()

    changed = client.webhooks.update(made.id, url=f"{URL}/2", event_types=[FAILED, SUCCEEDED, FAILED])
    assert (changed.name, changed.url, changed.event_types) == ("mine", f"{URL}/2", [FAILED, SUCCEEDED])
    assert client.webhooks.update(made.id, name="other").url == f"{URL}/2"
    assert client.webhooks.retrieve(made.id).name == "other"

    deleted = client.webhooks.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "webhook_endpoint.deleted", True)
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_endpoints_are_listed_newest_first_in_pages(client: OpenAI) -> None:
    ids = [client.webhooks.create(name=str(n), url=URL, event_types=[SUCCEEDED]).id for n in range(5)]

    assert [endpoint.id for endpoint in client.webhooks.list(limit=2)] == ids[::-1]
    assert client.webhooks.list(limit=2).has_more


def test_event_types_are_listed_and_all_are_subscribed_to_unless_named(client: OpenAI, http: httpx.Client) -> None:
    assert client.webhooks.event_types.list().data == [type.value for type in EventType]
    assert http.post("/v1/webhook_endpoints", json={"url": URL}).json()["event_types"] == [type.value for type in EventType]


def test_an_endpoint_is_disabled_by_our_own_field(client: OpenAI) -> None:
    made = client.webhooks.create(name="mine", url=URL, event_types=[SUCCEEDED])

    disabled = client.webhooks.update(made.id, extra_body={"is_enabled": False}).model_extra or {}
    assert (disabled["is_enabled"], disabled["disabled_reason"]) == (False, "requested")
    assert disabled["disabled_at"] >= made.created_at
    enabled = client.webhooks.update(made.id, extra_body={"is_enabled": True}).model_extra or {}
    assert (enabled["is_enabled"], enabled["disabled_at"], enabled["disabled_reason"]) == (True, None, None)


def test_only_what_changes_an_endpoint_moves_its_time_of_change(client: OpenAI) -> None:
    made = client.webhooks.create(name="mine", url=URL, event_types=[SUCCEEDED])
    assert made.updated_at == made.created_at
    time.sleep(1.1)  # the API tells whole seconds

    assert client.webhooks.update(made.id, url=URL, event_types=[SUCCEEDED]).updated_at == made.created_at
    assert (client.webhooks.update(made.id, name="other").updated_at or 0) > made.created_at


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/", "ftp://example.com", "https://user@example.com", "http://0x7f.1/", "nonsense"]
)
def test_a_url_that_cannot_be_delivered_to_is_refused_at_once(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.webhooks.create(name="mine", url=url, event_types=[SUCCEEDED])
    assert (refused.value.code, refused.value.param) == ("url_not_allowed", "url")

    made = client.webhooks.create(name="mine", url=URL, event_types=[SUCCEEDED])
    with pytest.raises(openai.BadRequestError):
        client.webhooks.update(made.id, url=url)
    assert client.webhooks.retrieve(made.id).url == URL


@pytest.mark.parametrize(
    "change",
    [
        {"event_types": []},
        {"event_types": ["batch.completed"]},
        {"event_types": "all"},
        {"name": "a\x00"},
        {"name": "\ud800"},
        {"name": "a" * 257},
        {"url": None},
        {"url": 5},
        {"url": "https://\ud800"},
        {"secret": "whsec_mine"},
    ],
)
def test_a_request_that_makes_no_sense_is_a_400(http: httpx.Client, change: dict[str, object]) -> None:
    body = json.dumps({"url": URL, "event_types": [SUCCEEDED]} | change)
    answer = http.post("/v1/webhook_endpoints", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_the_log_tells_how_each_delivery_went(
    client: OpenAI,
    http: httpx.Client,
    settings: Settings,
    system_sessions: orm.sessionmaker[orm.Session],
    organization: Caller,
    receiver: Receiver,
) -> None:
    made = client.webhooks.create(name="mine", url=receiver.url, event_types=[SUCCEEDED])
    for status in (200, 500):
        receiver.answer = answering(status)
        emit_event(system_sessions, organization)
        deliver(system_sessions, settings.webhooks)

    page = http.get(f"/v1/webhook_endpoints/{made.id}/deliveries", params={"limit": 1}).json()
    (failed,) = page["data"]
    assert (page["has_more"], failed["attempts"], failed["last_status"], failed["delivered_at"]) == (True, 1, 500, None)
    assert (failed["event_type"], failed["last_error"]) == (SUCCEEDED, "the receiver answered 500")
    assert failed["next_attempt_at"] > failed["created_at"]
    (delivered,) = http.get(f"/v1/webhook_endpoints/{made.id}/deliveries", params={"after": page["last_id"]}).json()["data"]
    assert (delivered["last_status"], delivered["last_error"], delivered["next_attempt_at"]) == (200, None, None)
    assert delivered["id"] == receiver.received[0].headers["webhook-id"]
    assert "body" not in delivered


def test_an_endpoint_goes_with_its_deliveries_however_many(
    client: OpenAI, system_sessions: orm.sessionmaker[orm.Session], organization: Caller, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="mine", url=receiver.url, event_types=[SUCCEEDED])
    for _ in range(2):
        emit_event(system_sessions, organization)
    with system_sessions.begin() as session:  # of a year
        one = rows_of(system_sessions, organization)[0]
        many = {"endpoint": made.id, "org": one.organization_id, "project": one.project_id, "many": delivery_log.MAX_REMOVED}
        session.execute(
            text(
                "INSERT INTO webhook_deliveries"
                " (id, organization_id, project_id, endpoint_id, event_id, event_type, body, attempts, next_attempt_at)"
                " SELECT 'msg_' || n, :org, :project, :endpoint, 'evt_' || n, '', '', 1, NULL FROM generate_series(1, :many) AS n"
            ),
            many,
        )
    client.webhooks.delete(made.id)

    with pytest.raises(openai.NotFoundError):
        client.webhooks.delete(made.id)
    assert list(client.webhooks.list()) == []
    emit_event(system_sessions, organization)
    assert deliver(system_sessions) == 0
    with system_sessions.begin() as session:
        assert [delivery_log.remove_deleted(session) for _ in range(4)] == [delivery_log.MAX_REMOVED, 2, 1, 0]


def test_a_project_has_a_limited_number_of_endpoints(client: OpenAI) -> None:
    def create(n: int) -> str | None:
        try:
            client.webhooks.create(name=str(n), url=URL, event_types=[SUCCEEDED])
        except openai.BadRequestError as refused:
            return refused.code
        return None

    assert not any(create(n) for n in range(MAX_ENDPOINTS - 1))
    with ThreadPoolExecutor(4) as threads:  # at once
        told = sorted(map(str, threads.map(create, range(4))))
    assert told == ["None"] + ["too_many_webhook_endpoints"] * 3


def test_the_sdk_repeats_its_making_and_makes_it_once(http: httpx.Client) -> None:
    body, repeated = {"url": URL, "event_types": [SUCCEEDED]}, {"x-stainless-retry-count": "1"}
    first = http.post("/v1/webhook_endpoints", json=body).json()  # which its client never hears
    again = http.post("/v1/webhook_endpoints", json=body, headers=repeated).json()
    assert (again["id"], again["signing_secret"]) == (first["id"], first["signing_secret"])

    assert http.post("/v1/webhook_endpoints", json=body).json()["id"] != first["id"]
    other = http.post("/v1/webhook_endpoints", json=body | {"name": "other"}, headers=repeated).json()
    assert other["id"] != first["id"]


def test_a_stranger_can_neither_see_nor_change_nor_delete(client: OpenAI, stranger: OpenAI) -> None:
    made = client.webhooks.create(name="mine", url=URL, event_types=[SUCCEEDED])
    theirs = stranger.webhooks
    for attempt in (
        lambda: theirs.retrieve(made.id),
        lambda: theirs.update(made.id, name="theirs"),
        lambda: theirs.delete(made.id),
        lambda: stranger.get(f"/webhook_endpoints/{made.id}/deliveries", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            attempt()
        assert refused.value.code == "webhook_endpoint_not_found"

    assert list(theirs.list()) == []
    assert client.webhooks.retrieve(made.id).name == "mine"
