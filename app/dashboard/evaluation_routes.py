"""Evaluations: how models did, with intervals, and each answer with its grades."""

import json
from itertools import groupby

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app import db
from app.accounts.caller import Caller as ApiCaller
from app.core.storage import Storage as ObjectStorage
from app.dashboard.answers import row_of
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Session, Sessions, Storage
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationOut, SampleOut
from app.files import excerpts
from app.files import service as files

router = APIRouter(prefix="/evaluations", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

A_PAGE, ANSWERS = 50, 40


@router.get("")
def list_evaluations(request: Request, session: Session, caller: Caller, after: str | None = None) -> HTMLResponse:
    found, has_more = evaluations.list_page(session, caller, after=after, limit=A_PAGE)
    return render(request, "evaluations.html", evaluations=[EvaluationOut.of(one) for one in found], has_more=has_more)


@router.get("/{evaluation_id}")
def show_evaluation(
    request: Request, sessions: Sessions, caller: Caller, storage: Storage, evaluation_id: str, after: str | None = None
) -> HTMLResponse:
    return _shown(request, sessions, caller, storage, evaluation_id, after=after)


@router.post("/{evaluation_id}/cancel")
def cancel_evaluation(request: Request, sessions: Sessions, caller: Caller, storage: Storage, evaluation_id: str) -> HTMLResponse:
    with db.organization_session(sessions, caller.organization_id) as session:
        evaluations.cancel(session, caller, evaluation_id)
    return _shown(request, sessions, caller, storage, evaluation_id)


def _shown(
    request: Request,
    sessions: orm.sessionmaker[orm.Session],
    caller: ApiCaller,
    storage: ObjectStorage,
    evaluation_id: str,
    *,
    after: str | None = None,
) -> HTMLResponse:
    with db.organization_session(sessions, caller.organization_id) as session:
        evaluation = evaluations.get(session, caller, evaluation_id)
        samples, has_more = evaluations.list_samples(session, caller, evaluation_id, after=after, limit=ANSWERS)
        file = files.find(session, caller, evaluation.file_id)
    answers = [SampleOut.of(sample) for sample in samples]
    lines = excerpts.lines_of(storage, file, {one.line for one in answers}, shown=excerpts.WHOLE) if file else {}
    told = EvaluationOut.of(evaluation)
    return render(
        request,
        "evaluation.html",
        evaluation=told,
        filename=file.filename if file else None,
        rows={line: list(of_line) for line, of_line in groupby(answers, key=lambda one: one.line)},
        asked={line: row_of(text) for line, text in lines.items()},
        last_id=answers[-1].id if answers else None,
        has_more=has_more,
        request_as_made=json.dumps(told.request, indent=2, ensure_ascii=False),
    )
