"""What we sign, the libraries that customers use must accept."""

import base64
import time

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

from app.webhooks import signing

BODY = '{"id": "evt_1", "object": "event", "type": "fine_tuning.job.succeeded", "data": {"id": "ftjob-ä"}}'.encode()


def test_both_libraries_accept_a_signature_and_nothing_else() -> None:
    secret = signing.new_secret()
    headers = signing.headers([secret], message_id="msg_1", unix_seconds=int(time.time()), body=BODY)

    assert Webhook(secret).verify(BODY, headers)["data"] == {"id": "ftjob-ä"}
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY.replace(b"evt_1", b"evt_2"), headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(signing.new_secret()).verify(BODY, headers)
    with OpenAI(api_key="none") as client:
        event = client.webhooks.unwrap(BODY, headers, secret=secret)
        assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", "ftjob-ä")
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(BODY, headers | {"webhook-id": "msg_2"}, secret=secret)


def test_a_known_signature() -> None:
    """The example of the Standard Webhooks specification's own libraries."""
    headers = signing.headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        message_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        unix_seconds=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets_are_random_and_their_hint_tells_little() -> None:
    secret, other = signing.new_secret(), signing.new_secret()

    assert secret != other
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    assert signing.hint_of(secret) == f"whsec_…{secret[-5:-1]}"
