"""Signing in and out."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import RedirectResponse

from app.accounts import users
from app.accounts.browser import Browser
from app.accounts.users import Visitor as Signed
from app.core.errors import NotFound, RateLimited, Unauthenticated
from app.dashboard.deps import OurBrowser
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Sessions

router = APIRouter(include_in_schema=False, route_class=PageRoute)

HOME = "/"


@router.get("/sign-in")
def show_form(request: Request, browser: OurBrowser, next: str = HOME) -> Response:
    if browser.visitor_of(request.scope):
        return RedirectResponse(_within(next), status_code=303)
    return render(request, "sign_in.html", problem=None, email="", next=_within(next))


@router.post("/sign-in")
def sign_in(
    request: Request,
    sessions: Sessions,
    browser: OurBrowser,
    email: Annotated[str, Form(max_length=320)],
    password: Annotated[str, Form(max_length=1024)],
    next: Annotated[str, Form(max_length=2048)] = HOME,
) -> Response:
    browser.require_own_origin(request.scope)
    try:
        visitor = users.by_password(sessions, email.replace("\x00", ""), password)
    except (Unauthenticated, RateLimited) as error:
        return render(request, "sign_in.html", status=error.status, problem=str(error), email=email, next=_within(next))
    return _signed_in(request, browser, visitor, next)


@router.get("/sign-in/{token}")
def show_link(request: Request, browser: OurBrowser, token: str) -> Response:
    try:
        visitor = browser.sign_ins.whose_link(token)
    except NotFound as error:
        return render(request, "sign_in.html", status=error.status, problem=str(error), email="", next=HOME)
    return render(request, "sign_in_link.html", link_of=visitor)


@router.post("/sign-in/{token}")
def take_link(request: Request, browser: OurBrowser, token: str) -> Response:
    browser.require_own_origin(request.scope)
    return _signed_in(request, browser, browser.sign_ins.take_link(token), f"{HOME}?by_link=true", by_link=True)


@router.post("/sign-out")
def sign_out(request: Request, browser: OurBrowser) -> Response:
    browser.require_own_origin(request.scope)
    if visitor := browser.visitor_of(request.scope):
        browser.sign_ins.end(visitor, browser.cookie_of(request.scope) or "")
    response = RedirectResponse("/sign-in", status_code=303)
    browser.forget(response, request.scope)
    return response


def _signed_in(request: Request, browser: Browser, visitor: Signed, next: str, *, by_link: bool = False) -> Response:
    response = RedirectResponse(_within(next), status_code=303)
    browser.remember(response, request.scope, browser.sign_ins.begin(visitor, by_link=by_link))
    return response


def _within(path: str) -> str:
    """A page of ours: a link to the form must not lead elsewhere afterwards."""
    is_ours = path.startswith("/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if is_ours else HOME
