"""Requests of a browser: who its cookie says it is, and whether a change was asked for by a page of ours."""

import hmac

from starlette.datastructures import URL, Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from app.accounts.users import SIGNED_IN_FOR, SignIns, Visitor
from app.core.errors import AppError, Unauthenticated

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
CSRF_HEADER = "x-csrf-token"


class Foreign(AppError):
    status, type, code = 403, "invalid_request_error", "foreign_page"


class Browser:
    """`url` is where browsers find us, if a proxy stands between; else it is what they ask for."""

    def __init__(self, sign_ins: SignIns, url: str | None) -> None:
        self.sign_ins, self._url = sign_ins, URL(url) if url else None

    def cookie_of(self, scope: Scope) -> str | None:
        return HTTPConnection(scope).cookies.get(self._name(scope))

    def visitor_of(self, scope: Scope) -> Visitor | None:
        cookie = self.cookie_of(scope)
        return self.sign_ins.visitor_of(cookie) if cookie else None

    def require_visitor(self, scope: Scope) -> Visitor:
        """Raises Unauthenticated for a cookie that is signed out, Foreign for a change that no page of ours asks for."""
        cookie, visitor = self.cookie_of(scope), self.visitor_of(scope)
        if cookie is None or visitor is None:
            raise Unauthenticated("you are not signed in any more; load the page again", code="signed_out")
        if scope["method"] not in SAFE_METHODS:
            self.require_own_origin(scope)
            sent = Headers(scope=scope).get(CSRF_HEADER, "")
            if not hmac.compare_digest(sent.encode(), self.sign_ins.csrf_token(cookie).encode()):
                raise Foreign("this page is of another sign-in than the one your browser has now; load it again")
        return visitor

    def require_own_origin(self, scope: Scope) -> None:
        origin, ours = Headers(scope=scope).get("origin"), self._base(scope)
        if origin is None or URL(origin).netloc != ours.netloc or URL(origin).scheme != ours.scheme:
            raise Foreign(f"a page of {origin or 'nowhere'} asked for this change, and only pages of {ours} may")

    def remember(self, response: Response, scope: Scope, cookie: str) -> None:
        """Sign this browser in."""
        response.set_cookie(
            self._name(scope),
            cookie,
            max_age=int(SIGNED_IN_FOR.total_seconds()),
            path="/",
            secure=self._is_secure(scope),
            httponly=True,
            samesite="lax",
        )

    def forget(self, response: Response, scope: Scope) -> None:
        response.delete_cookie(self._name(scope), path="/", secure=self._is_secure(scope), httponly=True, samesite="lax")

    def _base(self, scope: Scope) -> URL:
        asked = URL(scope=scope)
        return self._url or asked.replace(path="", query="", fragment="")

    def _is_secure(self, scope: Scope) -> bool:
        return self._base(scope).scheme == "https"

    def _name(self, scope: Scope) -> str:
        """A browser takes a `__Host-` cookie from nobody but this host, and over TLS only."""
        return "__Host-tunesmith" if self._is_secure(scope) else "tunesmith"
