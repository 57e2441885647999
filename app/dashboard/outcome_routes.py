"""What a run has come to: its checkpoints, its model beside the base, the rows that it finds hardest."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse

from app import db
from app.adapters import service as adapters
from app.core.errors import NotFound
from app.dashboard.deps import get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Session, Sessions, Storage
from app.files import excerpts
from app.files import service as files
from app.jobs import service as jobs

router = APIRouter(prefix="/jobs/{job_id}", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

CHECKPOINTS, EXAMPLES = 100, 20
REASONS = {
    "outlier": "unlike the others",
    "worse_than_base": "the base knew it better",
    "misranked": "the other answer is still likelier",
}


@router.get("/outcome")
def show_outcome(request: Request, session: Session, caller: Caller, job_id: str) -> HTMLResponse:
    job = jobs.get(session, caller, job_id)
    checkpoints, _ = jobs.list_checkpoints(session, caller, job_id, after=None, limit=CHECKPOINTS)
    losses = {
        checkpoint.step: checkpoint.metrics["valid_loss"] for checkpoint in checkpoints if "valid_loss" in checkpoint.metrics
    }
    best_step = min(losses, key=lambda step: losses[step], default=None)
    is_best_published = job.valid_loss is not None and job.valid_loss <= min(losses.values(), default=job.valid_loss)
    return render(
        request,
        "outcome.html",
        job=job,
        is_best_published=is_best_published,
        is_there=bool(job.fine_tuned_model and adapters.find(session, caller, job.fine_tuned_model)),
        checkpoints=checkpoints,
        best_step=None if is_best_published else best_step,
    )


@router.get("/examples")
def show_examples(request: Request, sessions: Sessions, caller: Caller, storage: Storage, job_id: str) -> HTMLResponse:
    """The rows with the highest loss, as they stand in their files, if those are still there. Rows that were held out of the
    training file are numbered as it is."""
    with db.organization_session(sessions, caller.organization_id) as session:
        job = jobs.get(session, caller, job_id)
        if job.examined is None:
            raise NotFound(f"the rows of {job_id} were not looked at: they are when a run is over")
        file_of = {"training": job.training_file_id, "validation": job.validation_file_id or job.training_file_id}
        found = {file_id: files.find(session, caller, file_id) for file_id in set(file_of.values())}
    listed = {(row["split"], row["line"]): row for row in (*job.examined["suspicious"], *job.examined["hardest"])}
    hardest = sorted(listed.values(), key=lambda row: -row["loss"])[:EXAMPLES]
    wanted = {file_id: {row["line"] for row in hardest if file_of[row["split"]] == file_id} for file_id in found}
    texts = {id_: excerpts.lines_of(storage, file, wanted[id_]) if file else {} for id_, file in found.items()}
    lines = {split: texts[file_id] for split, file_id in file_of.items()}
    return render(request, "examples.html", examined=job.examined, hardest=hardest, lines=lines, reasons=REASONS)
