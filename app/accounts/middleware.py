"""Authentication before any body is read: FastAPI parses bodies before it runs dependencies."""

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.accounts.keys import KeyRing
from app.core.errors import Unauthenticated
from app.handlers import respond


class Authenticate:
    """Puts the Caller of a `/v1/` request into its state, or answers 401."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                secret = _bearer(Headers(scope=scope))
                scope["state"]["caller"] = await run_in_threadpool(self._keys.caller_of, secret)
            except Exception as error:  # whatever it is becomes an answer: nothing outside knows how to
                await respond(error, scope, receive, send)
                return
        await self._app(scope, receive, send)


def _bearer(headers: Headers) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated("no API key was sent; send the header 'Authorization: Bearer ts-…'", code="missing_api_key")
    return secret.strip()
