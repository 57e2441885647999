"""What pages ask for beside the API's own dependencies: whoever is signed in."""

from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from app.accounts.browser import SAFE_METHODS, Browser
from app.accounts.users import Visitor
from app.core.errors import AppError
from app.deps import Settings


class NotSignedIn(AppError):
    status, code = 401, "signed_out"


def get_browser(request: Request) -> Browser:
    browser: Browser = request.app.state.browser
    return browser


OurBrowser = Annotated[Browser, Depends(get_browser)]


async def get_visitor(request: Request, browser: OurBrowser) -> Visitor:
    find = browser.visitor_of if request.method in SAFE_METHODS else browser.require_visitor
    visitor = await run_in_threadpool(find, request.scope)
    cookie = browser.cookie_of(request.scope)
    if visitor is None or cookie is None:
        raise NotSignedIn("sign in first")
    request.state.visitor, request.state.csrf_token = visitor, browser.sign_ins.csrf_token(cookie)
    request.state.caller = visitor.caller
    return visitor


def get_base_url(request: Request, settings: Settings) -> str:
    """Of the API, for programs: where people are told to find the dashboard, or as this browser has."""
    return f"{settings.dashboard.url}/v1" if settings.dashboard.url else str(request.base_url.replace(path="/v1"))


BaseUrl = Annotated[str, Depends(get_base_url)]
SignedIn = Annotated[Visitor, Depends(get_visitor)]
