"""Standard Webhooks (standardwebhooks.com): what `openai`'s `client.webhooks.unwrap` and every other verifier accepts."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"
SECRET_BYTES = 32
HINT_LENGTH = 4


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def hint_of(secret: str) -> str:
    """Enough of its end to recognise it."""
    return f"{PREFIX}…{secret.rstrip('=')[-HINT_LENGTH:]}"


def headers(secrets: Sequence[str], *, message_id: str, unix_seconds: int, body: bytes) -> dict[str, str]:
    """The three headers that prove who sent the message and when: one signature by each secret, any of which is enough."""
    signed = f"{message_id}.{unix_seconds}.".encode() + body
    signatures = " ".join(f"v1,{_signature(secret, signed)}" for secret in secrets)
    return {"webhook-id": message_id, "webhook-timestamp": str(unix_seconds), "webhook-signature": signatures}


def _signature(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
