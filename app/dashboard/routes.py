from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from app.core.data import TO_TRAIN
from app.core.errors import AppError
from app.core.methods import METHODS
from app.dashboard import jobs as shown
from app.dashboard import new_job
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import BaseModels, Caller, Session, Settings
from app.files import service as files
from app.jobs import curves
from app.jobs import service as jobs
from app.jobs.curves import CurvesOut
from app.jobs.routes import DryRuns
from app.models import FileStatus, Job

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

A_PAGE, EVENTS, CHOICES = 50, 100, 200
POINTS = 600  # as many as a chart has pixels


async def _form_of(request: Request) -> dict[str, str]:
    async with request.form() as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


@router.get("/")
def overview(request: Request, session: Session, caller: Caller, by_link: bool = False) -> HTMLResponse:
    unfinished, number = shown.unfinished(session, caller, most=12)
    recent, _ = jobs.list_page(session, caller, after=None, limit=8, options=shown.SHORT)
    views = shown.views(session, [*unfinished, *recent])  # at once: places in the queue are computed for all that wait
    now = views[: len(unfinished)]
    return render(
        request,
        "overview.html",
        by_link=by_link,
        running=[job for job in now if job.status == "running"],
        waiting=[job for job in now if job.status != "running"],
        unfinished=number,
        month=shown.last_month(session, caller),
        models=shown.models(session, caller),
        recent=views[len(unfinished) :],
    )


@router.get("/jobs")
def list_jobs(request: Request, session: Session, caller: Caller, after: str | None = None) -> HTMLResponse:
    found, has_more = jobs.list_page(session, caller, after=after, limit=A_PAGE, options=shown.SHORT)
    return render(request, "jobs.html", jobs=shown.views(session, found), has_more=has_more)


@router.get("/jobs/new")
def show_form(
    request: Request,
    session: Session,
    caller: Caller,
    catalog: BaseModels,
    settings: Settings,
    training_file: str = "",
    again: str = "",
) -> HTMLResponse:
    """With the newest files to choose from. `again` names a job whose settings it begins with."""
    values = new_job.values_of(jobs.get(session, caller, again)) if again else {}
    found, _ = files.list_page(session, caller, purpose=TO_TRAIN, after=None, limit=CHOICES, order="desc")
    return render(
        request,
        "new_job.html",
        files=[file for file in found if file.status != FileStatus.ERROR],
        chosen=training_file or values.get("training_file", ""),
        values=values,
        cards=new_job.cards(catalog, among=settings.training.tiers, gpu=settings.gpu),
        methods=METHODS,
        usual=catalog.resolve(settings.inference.base).id,
    )


@router.post("/jobs/new/plan")
async def plan_job(request: Request, caller: Caller, dry_runs: DryRuns) -> HTMLResponse:
    """What would come of the form as it is. Its problems are part of the answer."""
    form = await _form_of(request)
    try:
        seen = await run_in_threadpool(dry_runs.run, caller, new_job.asked(form, dry_run=True))
    except AppError as error:
        return render(request, "plan.html", seen=None, refused=error, told=new_job.in_words(error))
    is_unmeasured = not (form.get("validation_file") or form.get("validation_split"))
    return render(request, "plan.html", seen=seen, refused=None, is_unmeasured=is_unmeasured)


@router.post("/jobs")
def create_job(
    session: Session,
    caller: Caller,
    catalog: BaseModels,
    settings: Settings,
    form: Annotated[dict[str, str], Depends(_form_of)],
) -> Response:
    training = settings.training
    job = jobs.create(
        session,
        caller,
        catalog,
        request=new_job.asked(form, dry_run=False),
        tiers=training.tiers,
        gpu=settings.gpu,
        limits=settings.evaluations,
        quantizations=training.quantizations,
    )
    return Response(headers={"HX-Redirect": f"/jobs/{job.id}"})


@router.get("/jobs/{job_id}")
def show_job(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    job = jobs.get(session, caller, job_id)
    events, _ = jobs.list_messages(session, caller, job_id, limit=EVENTS)
    named = {
        file_id: files.find(session, caller, file_id) for file_id in (job.training_file_id, job.validation_file_id) if file_id
    }
    return _render(
        request,
        session,
        job,
        "job.html",
        events=events,
        files=named,
        asked=shown.asked(job),
        chosen=shown.chosen(job),
        settings=(job.plan or {}).get("auto", {}),
    )


@router.get("/jobs/{job_id}/state")
def show_job_state(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    return _render(request, session, jobs.get(session, caller, job_id), "job_state.html")


@router.get("/jobs/{job_id}/curves")
def get_curves(
    session: Session, caller: Caller, job_id: str, points: Annotated[int, Query(ge=10, le=2000)] = POINTS
) -> CurvesOut:
    return curves.of_job(session, caller, job_id, points=points)


@router.post("/jobs/{job_id}/pause")
def pause_job(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    return _render(request, session, jobs.pause(session, caller, job_id), "job_state.html")


@router.post("/jobs/{job_id}/resume")
def resume_job(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    return _render(request, session, jobs.resume(session, caller, job_id), "job_state.html")


@router.post("/jobs/{job_id}/cancel")
def cancel_job(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    return _render(request, session, jobs.cancel(session, caller, job_id), "job_state.html")


def _render(request: Request, session: Session, job: Job, template: str, **values: Any) -> HTMLResponse:
    (view,) = shown.views(session, [job])
    return render(request, template, job=view, latest=shown.latest(session, job), memory=shown.memory(job), **values)
