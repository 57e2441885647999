from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app.accounts import keys
from app.accounts.caller import Caller as ApiCaller
from app.dashboard.deps import BaseUrl, get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Session, Settings

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])


@dataclass(frozen=True)
class Made:
    """A secret that is shown once, and what it is of."""

    name: str
    secret: str


@router.get("/keys")
def list_keys(request: Request, session: Session, caller: Caller, base_url: BaseUrl) -> HTMLResponse:
    return _listed(request, session, caller, base_url)


@router.post("/keys")
def create_key(
    request: Request,
    session: Session,
    caller: Caller,
    settings: Settings,
    base_url: BaseUrl,
    name: Annotated[str, Form(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")],
) -> HTMLResponse:
    pepper = settings.key_pepper.get_secret_value().encode()
    owner = {"organization_id": caller.organization_id, "project_id": caller.project_id}
    made = Made(name, keys.create(session, **owner, name=name, pepper=pepper))
    session.flush()
    return _listed(request, session, caller, base_url, made=made)


@router.delete("/keys/{key_id}")
def revoke_key(request: Request, session: Session, caller: Caller, base_url: BaseUrl, key_id: str) -> HTMLResponse:
    keys.revoke(session, caller, key_id)
    return _listed(request, session, caller, base_url)


def _listed(
    request: Request, session: orm.Session, caller: ApiCaller, base_url: str, *, made: Made | None = None
) -> HTMLResponse:
    return render(request, "keys.html", keys=keys.list_all(session, caller), made=made, base_url=base_url)
