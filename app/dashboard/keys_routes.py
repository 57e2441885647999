from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app.accounts import keys
from app.accounts.caller import Caller as ApiCaller
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute, base_url_of
from app.deps import Caller, Session, Settings

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])


@dataclass(frozen=True)
class Made:
    """A secret that is shown once, and what it is of."""

    name: str
    secret: str


@router.get("/keys")
def list_keys(request: Request, session: Session, caller: Caller) -> HTMLResponse:
    return _listed(request, session, caller)


@router.post("/keys")
def create_key(
    request: Request,
    session: Session,
    caller: Caller,
    settings: Settings,
    name: Annotated[str, Form(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")],
) -> HTMLResponse:
    pepper = settings.key_pepper.get_secret_value().encode()
    owner = {"organization_id": caller.organization_id, "project_id": caller.project_id}
    made = Made(name, keys.create(session, **owner, name=name, pepper=pepper))
    session.flush()
    return _listed(request, session, caller, made=made)


@router.delete("/keys/{key_id}")
def revoke_key(request: Request, session: Session, caller: Caller, key_id: str) -> HTMLResponse:
    keys.revoke(session, caller, key_id)
    return _listed(request, session, caller)


def _listed(request: Request, session: orm.Session, caller: ApiCaller, *, made: Made | None = None) -> HTMLResponse:
    found = keys.list_all(session, caller)
    return render(request, "keys.html", keys=found, made=made, base_url=base_url_of(request))
