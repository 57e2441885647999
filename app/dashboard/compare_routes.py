"""Jobs over each other: their curves, in what they differ, what evaluations say of their models."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse

from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Prices, Session
from app.jobs import comparing, curves
from app.jobs.curves import CurvesOut

router = APIRouter(prefix="/jobs/compare", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

POINTS = 300  # of each curve

Ids = Annotated[list[str], Query(default_factory=list)]


@router.get("")
def compare_jobs(request: Request, session: Session, caller: Caller, prices: Prices, ids: Ids) -> HTMLResponse:
    """The curves come by themselves. The names of what differs are the same in all jobs that have been looked at."""
    found = comparing.compare(session, caller, ids, points=None, prices=prices).data
    chosen = next((job.resolved for job in found if job.resolved is not None), {})
    graders = dict.fromkeys(
        (evaluation.file, evaluation.id, grader)
        for job in found
        for evaluation in job.evaluations
        for grader in evaluation.grades or ()
    )
    return render(request, "compare.html", jobs=found, asked=list(found[0].requested), chosen=list(chosen), graders=list(graders))


@router.get("/curves")
def get_curves(session: Session, caller: Caller, ids: Ids) -> dict[str, CurvesOut]:
    return {id_: curves.of_job(session, caller, id_, points=POINTS) for id_ in ids[: comparing.MOST]}
