"""Whoever is signed in: their password."""

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from app.accounts import users
from app.accounts.browser import Browser
from app.accounts.users import Visitor
from app.core.errors import BadRequest, RateLimited, Unauthenticated
from app.dashboard.deps import OurBrowser, SignedIn
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Sessions

router = APIRouter(prefix="/account", include_in_schema=False, route_class=PageRoute)


@router.get("")
def show_account(request: Request, visitor: SignedIn, browser: OurBrowser, is_changed: bool = False) -> Response:
    return _shown(request, must_prove=_must_prove(request, visitor, browser), is_changed=is_changed)


@router.post("/password")
def change_password(
    request: Request,
    sessions: Sessions,
    visitor: SignedIn,
    browser: OurBrowser,
    password: Annotated[str, Form(max_length=1024)],
    current: Annotated[str, Form(max_length=1024)] = "",
) -> Response:
    """All browsers of this user are signed out but this one, which is signed in anew."""
    must_prove = _must_prove(request, visitor, browser)
    try:
        users.change_password(sessions, visitor, current=current if must_prove else None, password=password)
    except Unauthenticated:
        return _shown(request, must_prove=must_prove, problem="The current password is wrong.")
    except (RateLimited, BadRequest) as error:
        return _shown(request, must_prove=must_prove, problem=str(error))
    response = Response(headers={"HX-Redirect": "/account?is_changed=true"})
    browser.remember(response, request.scope, browser.sign_ins.begin(visitor))
    return response


def _must_prove(request: Request, visitor: Visitor, browser: Browser) -> bool:
    return browser.sign_ins.must_prove(visitor, browser.cookie_of(request.scope) or "")


def _shown(request: Request, *, must_prove: bool, problem: str | None = None, is_changed: bool = False) -> Response:
    return render(
        request,
        "account.html",
        must_prove=must_prove,
        problem=problem,
        is_changed=is_changed,
        shortest=users.SHORTEST_PASSWORD,
    )
