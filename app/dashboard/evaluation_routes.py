"""Evaluations: how models did, with intervals, and each answer with its grades."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import orm

from app.accounts.caller import Caller as ApiCaller
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Session
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationOut, SampleOut
from app.files import service as files

router = APIRouter(prefix="/evaluations", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

A_PAGE, ANSWERS = 50, 40


@router.get("")
def list_evaluations(request: Request, session: Session, caller: Caller, after: str | None = None) -> HTMLResponse:
    found, has_more = evaluations.list_page(session, caller, after=after, limit=A_PAGE)
    return render(request, "evaluations.html", evaluations=[EvaluationOut.of(one) for one in found], has_more=has_more)


@router.get("/{evaluation_id}")
def show_evaluation(
    request: Request, session: Session, caller: Caller, evaluation_id: str, after: str | None = None
) -> HTMLResponse:
    return _shown(request, session, caller, evaluation_id, after=after)


@router.post("/{evaluation_id}/cancel")
def cancel_evaluation(request: Request, session: Session, caller: Caller, evaluation_id: str) -> HTMLResponse:
    evaluations.cancel(session, caller, evaluation_id)
    return _shown(request, session, caller, evaluation_id)


def _shown(
    request: Request, session: orm.Session, caller: ApiCaller, evaluation_id: str, *, after: str | None = None
) -> HTMLResponse:
    evaluation = evaluations.get(session, caller, evaluation_id)
    samples, has_more = evaluations.list_samples(session, caller, evaluation_id, after=after, limit=ANSWERS)
    file = files.find(session, caller, evaluation.file_id)
    return render(
        request,
        "evaluation.html",
        evaluation=EvaluationOut.of(evaluation),
        filename=file.filename if file else None,
        samples=[SampleOut.of(sample) for sample in samples],
        has_more=has_more,
    )
