"""API keys: 256 random bits and a checksum, of which only a keyed hash is stored."""

import base64
import hashlib
import hmac
import secrets
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from sqlalchemy import Select, func, orm, select, text

from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import NotFound, Unauthenticated
from app.models import ApiKey

PREFIX = "ts-"
REMEMBERED_SECONDS = 5.0  # so long may a revoked key still work
REMEMBERED_KEYS = 10_000


def create(session: orm.Session, *, organization_id: str, project_id: str, name: str, pepper: bytes) -> str:
    """Make a key and return its secret, which is never shown again."""
    secret = generate()
    session.add(
        ApiKey(
            id=ids.new("key_"),
            organization_id=organization_id,
            project_id=project_id,
            name=name,
            hash=hash_of(secret, pepper),
            shown_prefix=secret[: len(PREFIX) + 4],
        )
    )
    return secret


def list_all(session: orm.Session, caller: Caller) -> Sequence[ApiKey]:
    """Of the caller's project, the newest first, those that were revoked too."""
    return session.scalars(_visible(caller).order_by(ApiKey.id.desc())).all()


def revoke(session: orm.Session, caller: Caller, key_id: str) -> None:
    """Twice is the same as once. It may still work for `REMEMBERED_SECONDS`."""
    key = session.scalar(_visible(caller).where(ApiKey.id == key_id))
    if key is None:
        raise NotFound(f"the key {key_id!r} does not exist or is not yours", code="key_not_found")
    if key.revoked_at is None:
        key.revoked_at = func.clock_timestamp()
    session.flush()
    session.refresh(key)


def _visible(caller: Caller) -> Select[ApiKey]:
    return select(ApiKey).where(ApiKey.organization_id == caller.organization_id, ApiKey.project_id == caller.project_id)


def generate() -> str:
    """`ts-` + 43 characters of 256 random bits + 6 of their CRC-32: a typing error is found without a look-up."""
    body = _encoded(secrets.token_bytes(32))
    return PREFIX + body + _checksum(body)


def hash_of(secret: str, pepper: bytes) -> str:
    return hmac.new(pepper, secret.encode(), hashlib.sha256).hexdigest()


def is_well_formed(secret: str) -> bool:
    body = secret.removeprefix(PREFIX)
    return secret.startswith(PREFIX) and len(body) > 6 and body.isascii() and _checksum(body[:-6]) == body[-6:]


class KeyRing:
    """Looks keys up and remembers the answer for a few seconds, so that a stream of requests costs one query."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], pepper: bytes) -> None:
        self._sessions, self._pepper = sessions, pepper
        self._known: OrderedDict[str, tuple[float, Caller]] = OrderedDict()
        self._lock = Lock()

    def caller_of(self, secret: str) -> Caller:
        """Raises Unauthenticated, saying what is wrong with the key."""
        if not is_well_formed(secret):
            raise Unauthenticated("the API key is malformed; keys begin with 'ts-' and are copied whole")
        hashed = hash_of(secret, self._pepper)
        with self._lock:
            at, caller = self._known.get(hashed, (0.0, None))
        if caller is not None and time.monotonic() - at < REMEMBERED_SECONDS:
            return caller
        caller = self._look_up(hashed)
        with self._lock:
            self._known[hashed] = (time.monotonic(), caller)
            self._known.move_to_end(hashed)
            if len(self._known) > REMEMBERED_KEYS:
                self._known.popitem(last=False)
        return caller

    def _look_up(self, hashed: str) -> Caller:
        with self._sessions.begin() as session:
            row = session.execute(text("SELECT * FROM find_api_key(:hash)"), {"hash": hashed}).one_or_none()
        if row is None:
            raise Unauthenticated("the API key is unknown, expired or revoked; ask the operator for a new one")
        return Caller(row.key_id, row.organization_id, row.project_id, row.organization_slug)


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _checksum(body: str) -> str:
    return _encoded(zlib.crc32(body.encode()).to_bytes(4, "big"))
