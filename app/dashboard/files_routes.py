from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse

from app import db
from app.core.data import MAX_LISTED, TO_EVALUATE, TO_TRAIN, Report
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import BaseModels, Caller, Session, Sessions, Settings, Storage
from app.files import excerpts
from app.files import service as files
from app.jobs.routes import DryRuns
from app.jobs.schemas import JobCreate
from app.models import FileStatus

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

A_PAGE, FIRST_ROWS = 50, 3


@router.get("/files")
def list_files(
    request: Request,
    session: Session,
    caller: Caller,
    settings: Settings,
    after: str | None = None,
    purpose: Literal["", "fine-tune", "evals", "fine-tune-results"] = "",
) -> HTMLResponse:
    found, has_more = files.list_page(session, caller, purpose=purpose or None, after=after, limit=A_PAGE, order="desc")
    waits = any(file.status == FileStatus.UPLOADED for file in found)
    return render(
        request,
        "files.html",
        files=found,
        has_more=has_more,
        waits=waits,
        purpose=purpose,
        part_bytes=settings.limits.part_bytes,
    )


@router.get("/files/{file_id}")
def show_file(
    request: Request, sessions: Sessions, caller: Caller, storage: Storage, catalog: BaseModels, file_id: str
) -> HTMLResponse:
    with db.organization_session(sessions, caller.organization_id) as session:
        file = files.get(session, caller, file_id)
    report = Report.model_validate(file.report) if file.report else None
    first = set(range(1, min(report.rows, FIRST_ROWS) + 1)) if report else set[int]()
    lines = excerpts.lines_of(storage, file, first | {one.line for one in report.problems}) if report else {}
    is_valid = file.status == FileStatus.PROCESSED
    return render(
        request,
        "file.html",
        file=file,
        report=report,
        lines=lines,
        first=sorted(first & lines.keys()),
        listed=MAX_LISTED,
        bases=list(catalog.values()) if is_valid and file.purpose == TO_TRAIN else [],
        can_evaluate=is_valid and file.purpose == TO_EVALUATE,
    )


@router.post("/files/{file_id}/look")
def look_at_file(request: Request, caller: Caller, dry_runs: DryRuns, file_id: str, base: Annotated[str, Form()]) -> Response:
    """What a base makes of it: lengths in tokens, and the first rows as they will be trained on."""
    body = JobCreate(model=base, training_file=file_id, dry_run=True)
    return render(request, "look.html", seen=dry_runs.run(caller, body))


@router.delete("/files/{file_id}")
def delete_file(session: Session, caller: Caller, file_id: str) -> Response:
    files.delete(session, caller, file_id)
    return Response(headers={"HX-Redirect": "/files"})
