"""Making an evaluation: a file, models, and graders that are added one by one."""

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import orm
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from app import db
from app.accounts.caller import Caller as ApiCaller
from app.adapters import aliases
from app.adapters import service as adapters
from app.core import data
from app.core.catalog import Catalog
from app.core.errors import AppError, NotFound
from app.dashboard import new_evaluation
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import BaseModels, Caller, OpenSession, Session, Sessions, Settings, Storage
from app.evaluations import service as evaluations
from app.evaluations.routes import Asks, create_evaluation
from app.evaluations.schemas import MAX_MODELS
from app.files import excerpts
from app.files import service as files
from app.inference import engines
from app.models import FileStatus

router = APIRouter(prefix="/evaluations/new", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

CHOICES = 200  # of files


async def _form_of(request: Request) -> FormData:
    async with request.form(max_files=0) as form:
        return form


Form = Annotated[FormData, Depends(_form_of)]


@router.get("")
def show_form(
    request: Request,
    session: Session,
    caller: Caller,
    catalog: BaseModels,
    settings: Settings,
    asker: Asks,
    file: str = "",
    model: Annotated[list[str] | None, Query()] = None,
) -> HTMLResponse:
    """With the newest files to choose from. Models that are named are chosen; the first is what others are compared with."""
    found, _ = files.list_page(session, caller, purpose=data.TO_EVALUATE, after=None, limit=CHOICES, order="desc")
    live = engines.list_live(session, timeout_seconds=settings.inference.heartbeat_timeout_seconds)
    groups = dict(_models(session, caller, catalog, served={engine.base for engine in live}, named=(model or ())[:MAX_MODELS]))
    named = [name for name in model or () if any(name in group for group in groups.values())]
    usual = catalog.resolve(settings.inference.base).id
    return render(
        request,
        "new_evaluation.html",
        files=[one for one in found if one.status != FileStatus.ERROR],
        file=file,
        groups=groups,
        first=named[0] if named else usual,
        others=named[1:],
        judges=list(asker.judges),
        kinds=new_evaluation.KINDS,
        most=MAX_MODELS,
    )


@router.get("/rows")
def show_rows(
    request: Request, sessions: Sessions, caller: Caller, storage: Storage, file: Annotated[str, Query(max_length=256)] = ""
) -> HTMLResponse:
    """What the rows of the chosen file are, and what a grader can name of them; of items also what is asked about one."""
    if not file:
        return render(request, "evaluated_rows.html", file=None)
    with db.organization_session(sessions, caller.organization_id) as session:
        found = files.get(session, caller, file)
    held = str((found.report or {}).get("format", ""))
    line = excerpts.lines_of(storage, found, {1}, shown=excerpts.WHOLE).get(1, "") if held else ""
    return render(
        request,
        "evaluated_rows.html",
        file=found,
        held=held,
        line=line[: excerpts.SHOWN],
        is_item=held == data.ITEM,
        placeholders=new_evaluation.placeholders(held, _row(line)),
    )


@router.get("/grader")
def show_grader(
    request: Request,
    session: Session,
    caller: Caller,
    asker: Asks,
    kind: str,
    key: Annotated[str | None, Query(pattern=r"^grader\.[0-9a-f]{8}$")] = None,
) -> HTMLResponse:
    """The fields of one more grader, or once more of the one with this key."""
    if kind not in new_evaluation.KINDS:
        raise NotFound(f"{kind[:64]!r} is no kind of grader", param="kind")
    return render(
        request,
        "grader.html",
        kind=kind,
        key=key or f"{new_evaluation.GRADER}{secrets.token_hex(4)}",
        kinds=new_evaluation.KINDS,
        name=new_evaluation.FIRST_NAMES.get(kind, ""),
        operations=new_evaluation.OPERATIONS,
        likenesses=new_evaluation.LIKENESSES,
        judges=[*asker.judges, *(model.name for model in adapters.list_published(session, caller))],
    )


@router.post("/plan")
def plan_evaluation(
    request: Request, session: Session, caller: Caller, catalog: BaseModels, settings: Settings, asker: Asks, form: Form
) -> HTMLResponse:
    """What would come of the form as it is. Its problems are part of the answer."""
    try:
        body = new_evaluation.asked(form)
        file, _ = evaluations.checked(
            session, caller, catalog, request=body, judges=asker.judges.keys(), settings=settings.evaluations
        )
    except AppError as error:
        return render(request, "evaluation_plan.html", refused=error if new_evaluation.is_begun(form) else None, body=None)
    rows = (file.report or {}).get("rows")
    return render(request, "evaluation_plan.html", body=body, rows=rows, held=(file.report or {}).get("format", ""), refused=None)


@router.post("")
async def create(
    open_session: OpenSession, caller: Caller, catalog: BaseModels, settings: Settings, asker: Asks, form: Form
) -> Response:
    body = new_evaluation.asked(form)
    made = await run_in_threadpool(create_evaluation, body, open_session, caller, catalog, settings, asker)
    return Response(headers={"HX-Redirect": f"/evaluations/{made.id}"})


def _models(
    session: orm.Session, caller: ApiCaller, catalog: Catalog, *, served: set[str], named: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Names that can be asked, by what they are: of checkpoints those that are named, and no base that no engine serves and no
    model is of."""
    found = [adapters.find(session, caller, name) for name in named]
    checkpoints = [model for model in found if model is not None and model.step is not None]
    tuned = [*checkpoints, *adapters.list_published(session, caller)]
    wanted = served | {model.base for model in tuned}
    yield "Bases", [base.id for base in catalog.values() if base.id in wanted]
    yield "Your models", [model.name for model in tuned]
    yield "Aliases", [alias.name for alias, _ in aliases.list_pointed(session, caller)]


def _row(line: str) -> dict[str, Any] | None:
    """A line as it was read, unless it was too long to be shown whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
