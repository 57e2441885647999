from collections import defaultdict

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app.accounts.caller import Caller as ApiCaller
from app.adapters import aliases
from app.adapters import service as adapters
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import BaseModels, Caller, Session, Settings
from app.inference import engines
from app.models import ModelAlias

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])


@router.get("/models")
def list_models(request: Request, session: Session, caller: Caller) -> HTMLResponse:
    return _listed(request, session, caller)


@router.delete("/models/{name:path}")
def delete_model(request: Request, session: Session, caller: Caller, catalog: BaseModels, name: str) -> HTMLResponse:
    adapters.delete(session, caller, catalog, name)
    session.flush()
    return _listed(request, session, caller)


@router.get("/playground")
def show_playground(request: Request, session: Session, settings: Settings) -> HTMLResponse:
    live = engines.list_live(session, timeout_seconds=settings.inference.heartbeat_timeout_seconds)
    return render(request, "playground.html", served=sorted({engine.base for engine in live}))


def _listed(request: Request, session: orm.Session, caller: ApiCaller) -> HTMLResponse:
    behind = defaultdict[str, list[ModelAlias]](list)
    for alias, _ in aliases.list_pointed(session, caller):
        behind[alias.model].append(alias)
    return render(request, "models.html", models=adapters.list_published(session, caller), aliases=behind)
