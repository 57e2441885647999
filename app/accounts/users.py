"""People who sign in to the dashboard: by password, or by a link that works once."""

import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from threading import BoundedSemaphore

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from sqlalchemy import delete, exists, func, orm, select, text

from app import db
from app.accounts import keys
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import BadRequest, Conflict, NotFound, RateLimited, Unauthenticated
from app.models import SignIn, SignInLink, User

SIGNED_IN_FOR = timedelta(days=14)
LINK_LASTS = timedelta(hours=24)
LINK_PROVES_FOR = timedelta(hours=1)  # who somebody is, as their password does
SHORTEST_PASSWORD, LONGEST_PASSWORD = 10, 256
MAX_FORGOTTEN = 1000  # at once, so that the transaction stays short
FREE_FAILURES, LONGEST_PAUSE_SECONDS = 5, 900
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")

_hasher = PasswordHasher()  # Argon2id as RFC 9106 recommends it where memory is short: 64 MiB, three passes
_hashing = BoundedSemaphore(2)  # each takes that memory and a core


@dataclass(frozen=True)
class Visitor:
    """Who is signed in, and as whom the services see them."""

    user_id: str
    name: str
    email: str
    is_operator: bool
    caller: Caller


def create(
    session: orm.Session, *, organization_id: str, project_id: str, email: str, name: str, is_operator: bool = False
) -> User:
    if not _EMAIL.fullmatch(email):
        raise BadRequest(f"{email[:100]!r} is not an e-mail address", param="email")
    user = User(
        id=ids.new("user-"),
        organization_id=organization_id,
        project_id=project_id,
        email=email.lower(),
        name=name,
        is_operator=is_operator,
    )
    session.add(user)
    return user


def set_password(session: orm.Session, user: User, password: str) -> None:
    """Every browser of this user is signed out, and links stop working. Raises BadRequest."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        message = f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters, and this one has {len(password)}"
        raise BadRequest(message, param="password")
    user.password_hash = _hash(password)
    sign_out_everywhere(session, user)


def sign_out_everywhere(session: orm.Session, user: User) -> None:
    """Links that were made for this user stop working too."""
    for table in (SignIn, SignInLink):
        session.execute(delete(table).where(table.user_id == user.id))


def change_password(sessions: orm.sessionmaker[orm.Session], visitor: Visitor, *, current: str | None, password: str) -> None:
    """`current` is null where it need not be known: `SignIns.must_prove`. Raises as `set_password` and `by_password` do."""
    if current is not None:
        by_password(sessions, visitor.email, current)
    with db.organization_session(sessions, visitor.caller.organization_id) as session:
        set_password(session, session.get_one(User, visitor.user_id), password)


def by_password(sessions: orm.sessionmaker[orm.Session], email: str, password: str) -> Visitor:
    """Raises Unauthenticated, which does not say whether there is such a user; RateLimited after many wrong passwords."""
    with sessions.begin() as session:
        found = _found(session, "find_user", email)
    if found is None:
        _is_right(_nobodys_hash(), password)
        raise _wrong()
    with db.organization_session(sessions, found.caller.organization_id) as session:
        user = session.get_one(User, found.user_id, with_for_update=True)
        if session.scalar(select(User.not_before > func.clock_timestamp()).where(User.id == user.id)):
            raise RateLimited("too many wrong passwords; wait a while, or ask the operator for a sign-in link")
        is_right = _is_right(user.password_hash or _nobodys_hash(), password)
        user.failures = 0 if is_right else user.failures + 1
        if user.failures >= FREE_FAILURES:
            pause = min(2.0 ** (user.failures - FREE_FAILURES), LONGEST_PAUSE_SECONDS)
            user.not_before = func.clock_timestamp() + timedelta(seconds=pause)
    if not is_right:
        raise _wrong()
    return found


def make_link(session: orm.Session, user: User, *, pepper: bytes) -> str:
    """A token that signs this user in once, within a day. Raises Conflict for one who is disabled."""
    if user.disabled_at is not None:
        raise Conflict(f"{user.email} is disabled; `tunesmith users enable {user.email}` lets them in again", param="email")
    token = secrets.token_urlsafe(32)
    row = SignInLink(
        id=ids.new("link-"),
        organization_id=user.organization_id,
        project_id=user.project_id,
        user_id=user.id,
        hash=keys.hash_of(token, pepper),
        expires_at=func.clock_timestamp() + LINK_LASTS,
    )
    session.add(row)
    return token


def forget_old(session: orm.Session) -> int:
    """Sign-ins and links that have run out. Returns how many they were."""
    return sum(_forget(session, table) for table in (SignIn, SignInLink))


def _forget(session: orm.Session, table: type[SignIn] | type[SignInLink]) -> int:
    over = select(table.id).where(table.expires_at <= func.clock_timestamp()).limit(MAX_FORGOTTEN)
    return len(session.scalars(delete(table).where(table.id.in_(over)).returning(table.id)).all())


class SignIns:
    """Cookies of signed-in browsers, looked up at each request: a row that is deleted is signed out at once."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], pepper: bytes) -> None:
        self._sessions, self._pepper = sessions, pepper

    def visitor_of(self, cookie: str) -> Visitor | None:
        with self._sessions.begin() as session:
            return _found(session, "find_sign_in", self._hash(cookie))

    def whose_link(self, token: str) -> Visitor:
        """Looks, and leaves the link as it is: programs that preview links open them too."""
        with self._sessions.begin() as session:
            return _known(_found(session, "find_sign_in_link", self._hash(token)))

    def take_link(self, token: str) -> Visitor:
        with self._sessions.begin() as session:
            return _known(_found(session, "take_sign_in_link", self._hash(token)))

    def begin(self, visitor: Visitor, *, by_link: bool = False) -> str:
        """The cookie of a new sign-in."""
        cookie = secrets.token_urlsafe(32)
        with db.organization_session(self._sessions, visitor.caller.organization_id) as session:
            row = SignIn(
                id=ids.new("signin-"),
                organization_id=visitor.caller.organization_id,
                project_id=visitor.caller.project_id,
                user_id=visitor.user_id,
                hash=self._hash(cookie),
                expires_at=func.clock_timestamp() + SIGNED_IN_FOR,
                by_link=by_link,
            )
            session.add(row)
        return cookie

    def must_prove(self, visitor: Visitor, cookie: str) -> bool:
        """Whether a new password needs the old one: not for who has none, nor for who has just come by a link, perhaps because
        they have forgotten it. A browser that was left signed in is no proof."""
        came = func.clock_timestamp() - LINK_PROVES_FOR
        fresh = exists().where(SignIn.hash == self._hash(cookie), SignIn.by_link, SignIn.created_at > came)
        with db.organization_session(self._sessions, visitor.caller.organization_id) as session:
            must = select(User.password_hash.is_not(None) & ~fresh).where(User.id == visitor.user_id)
            return bool(session.scalar(must))

    def end(self, visitor: Visitor, cookie: str) -> None:
        with db.organization_session(self._sessions, visitor.caller.organization_id) as session:
            session.execute(delete(SignIn).where(SignIn.hash == self._hash(cookie)))

    def csrf_token(self, cookie: str) -> str:
        """What our own pages send along with every change, and no other site can know."""
        return self._hash(f"csrf {cookie}")

    def _hash(self, secret: str) -> str:
        return keys.hash_of(secret, self._pepper)


def _found(session: orm.Session, door: str, wanted: str) -> Visitor | None:
    row = session.execute(text(f"SELECT * FROM {door}(:wanted)"), {"wanted": wanted}).one_or_none()  # noqa: S608 - ours
    if row is None:
        return None
    caller = Caller(row.user_id, row.organization_id, row.project_id, row.organization_slug)
    return Visitor(row.user_id, row.name, row.email, row.is_operator, caller)


def _known(visitor: Visitor | None) -> Visitor:
    if visitor is None:
        raise NotFound("this link was used or is too old; ask for a new one, or sign in with your password")
    return visitor


@cache
def _nobodys_hash() -> str:
    """For who does not exist or has no password, so that they take as long as a wrong one. Made when it is first needed: most
    processes that import this sign nobody in."""
    return _hash(secrets.token_hex())


def _hash(password: str) -> str:
    with _hashing:
        return _hasher.hash(password)


def _is_right(hashed: str, password: str) -> bool:
    with _hashing:
        try:
            return _hasher.verify(hashed, password[: LONGEST_PASSWORD + 1])
        except (VerifyMismatchError, InvalidHashError):
            return False


def _wrong() -> Unauthenticated:
    return Unauthenticated("e-mail address or password is wrong", code="wrong_password")
