from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app import pages
from app.deps import BaseModels, Caller, OpenSession, Session, Settings
from app.evaluations import graders
from app.evaluations import service as evaluations
from app.evaluations.asking import Asker
from app.evaluations.schemas import (
    EvaluationCreate,
    EvaluationOut,
    GraderRun,
    GraderRunOut,
    GraderValidate,
    GraderValidated,
    SampleOut,
)
from app.idempotency import IdempotentRoute

router = APIRouter(prefix="/v1", tags=["Evaluations"], route_class=IdempotentRoute)


def get_asker(request: Request) -> Asker:
    asker: Asker = request.app.state.asker
    return asker


Asks = Annotated[Asker, Depends(get_asker)]


@router.post("/fine_tuning/alpha/graders/run")
async def run_grader(body: GraderRun, caller: Caller, asker: Asks) -> GraderRunOut:
    """What a grader gives for an answer."""
    return await graders.run(body, caller, asker)


@router.post("/fine_tuning/alpha/graders/validate")
def validate_grader(body: GraderValidate, caller: Caller) -> GraderValidated:
    """Whether a grader can be used: it comes back as it was understood."""
    graders.require_usable(caller, [body.grader])
    return GraderValidated(grader=body.grader.model_dump(mode="json"))


@router.post("/evaluations")
def create_evaluation(
    body: EvaluationCreate, open_session: OpenSession, caller: Caller, catalog: BaseModels, settings: Settings, asker: Asks
) -> EvaluationOut:
    """Queue an evaluation: a file's rows, put to models, and graded."""
    graders.require_usable(caller, body.graders)  # in a process: no transaction may be open meanwhile
    made = evaluations.create(
        open_session(), caller, catalog, request=body, judges=asker.judges.keys(), settings=settings.evaluations
    )
    return EvaluationOut.of(made)


@router.get("/evaluations")
def list_evaluations(
    session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[EvaluationOut]:
    """Your evaluations, newest first."""
    return pages.page(evaluations.list_page(session, caller, after=after, limit=limit), EvaluationOut.of)


@router.get("/evaluations/{evaluation_id}")
def get_evaluation(evaluation_id: str, session: Session, caller: Caller) -> EvaluationOut:
    """One evaluation, with what it found."""
    return EvaluationOut.of(evaluations.get(session, caller, evaluation_id))


@router.get("/evaluations/{evaluation_id}/results")
def list_evaluation_results(
    evaluation_id: str, session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[SampleOut]:
    """Every answer with its grades, in the order of the file."""
    return pages.page(evaluations.list_samples(session, caller, evaluation_id, after=after, limit=limit), SampleOut.of)


@router.post("/evaluations/{evaluation_id}/cancel")
def cancel_evaluation(evaluation_id: str, session: Session, caller: Caller) -> EvaluationOut:
    """Stop an evaluation. Its answers so far stay."""
    return EvaluationOut.of(evaluations.cancel(session, caller, evaluation_id))
