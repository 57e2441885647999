"""Authentication before any body is read: FastAPI parses bodies before it runs dependencies."""

import hmac

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from app.accounts.browser import Browser
from app.accounts.caller import Caller
from app.accounts.keys import KeyRing
from app.core.errors import Unauthenticated
from app.handlers import respond


class Authenticate:
    """Puts the Caller of a `/v1/` request into its state, or answers 401. Internal routes are for our own engines.

    A caller sends a key; a page of the dashboard has the cookie of whoever is signed in, and no key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, browser: Browser, engine_token: str) -> None:
        self._app, self._keys, self._browser, self._engine_token = app, keys, browser, engine_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(("/v1/", "/internal/")):
            headers = Headers(scope=scope)
            try:
                if scope["path"].startswith("/internal/"):
                    self._require_engine(_bearer(headers))
                elif "authorization" not in headers and self._browser.cookie_of(scope):
                    scope["state"]["caller"] = (await run_in_threadpool(self._browser.require_visitor, scope)).caller
                else:
                    caller = await run_in_threadpool(self._keys.caller_of, _bearer(headers))
                    _require_own(headers, caller)
                    scope["state"]["caller"] = caller
            except Exception as error:  # whatever it is becomes an answer: nothing outside knows how to
                await respond(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _require_engine(self, token: str) -> None:
        if not hmac.compare_digest(token.encode(), self._engine_token.encode()):
            raise Unauthenticated("the engine token is wrong; set TUNESMITH_ENGINE_TOKEN to the gateway's value")


def _require_own(headers: Headers, caller: Caller) -> None:
    """The SDK's headers select within what a key may see; ours sees one project."""
    for header, own in (("openai-organization", caller.organization_id), ("openai-project", caller.project_id)):
        if headers.get(header, own) != own:
            raise Unauthenticated(f"the API key belongs to {own}, not to what the header {header} names", code="mismatched_scope")


def _bearer(headers: Headers) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated("no API key was sent; send the header 'Authorization: Bearer ts-…'", code="missing_api_key")
    return secret.strip()
