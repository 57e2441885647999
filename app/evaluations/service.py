"""Evaluations as their owners see them."""

from collections.abc import Container, Sequence

from pydantic import ValidationError
from sqlalchemy import ARRAY, Select, Text, cast, func, orm, select

from app import outbox, pages
from app.accounts.caller import Caller
from app.adapters import names
from app.core import ids
from app.core.catalog import Catalog
from app.core.errors import BadRequest, Conflict, NotFound
from app.core.settings import EvaluationSettings
from app.evaluations.schemas import EvaluationCreate
from app.files import service as files
from app.models import Evaluation, EvaluationSample, EvaluationState, File, FileStatus
from app.models.evaluations import UNDECIDED

MOST_NAMING = 300


def create(
    session: orm.Session,
    caller: Caller,
    catalog: Catalog,
    *,
    request: EvaluationCreate,
    judges: Container[str],
    settings: EvaluationSettings,
) -> Evaluation:
    """Queue an evaluation. The file may still be on its way through validation."""
    _, pinned = checked(session, caller, catalog, request=request, judges=judges, settings=settings)
    return add(session, caller, pinned)


def checked(
    session: orm.Session,
    caller: Caller,
    catalog: Catalog,
    *,
    request: EvaluationCreate,
    judges: Container[str],
    settings: EvaluationSettings,
) -> tuple[File, EvaluationCreate]:
    """The file of a request that can be queued, and the request with each alias as the model behind it. Raises AppError."""
    file = files.get_for_evaluation(session, caller, request.file, param="file")
    request = _pinned(session, caller, catalog, request)
    for param, judge in request.judges():
        if judge not in judges:
            names.resolve(session, caller, catalog, judge, param=param)
    require_possible(file, request, settings)
    return file, request


def add(session: orm.Session, caller: Caller, request: EvaluationCreate, *, job_id: str | None = None) -> Evaluation:
    """Queue an evaluation of which all is known to be there. With `job_id` it decides the quality gate of that job."""
    evaluation = Evaluation(
        id=ids.new("eval_"),
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        organization_slug=caller.organization_slug,
        name=request.name,
        job_id=job_id,
        file_id=request.file,
        request=request.model_dump(mode="json"),
    )
    session.add(evaluation)
    outbox.ring(session, files.CPU_QUEUE)
    session.flush()
    session.refresh(evaluation)
    return evaluation


def require_possible(file: File, request: EvaluationCreate, settings: EvaluationSettings) -> None:
    """Raises BadRequest for a file that is too large, or does not fit the request. One not yet read passes so far."""
    if file.size_bytes > settings.max_file_bytes:
        message = f"{file.id} has {file.size_bytes} bytes, and evaluations take at most {settings.max_file_bytes}; use fewer rows"
        raise BadRequest(message, param="file", code="too_many_samples")
    if file.status != FileStatus.PROCESSED or file.report is None:
        return
    samples = file.report["rows"] * len(request.models)
    if samples > settings.max_samples:
        message = (
            f"{file.report['rows']} rows × {len(request.models)} models are {samples} samples, over the limit of "
            f"{settings.max_samples}; use fewer rows or models"
        )
        raise BadRequest(message, param="file", code="too_many_samples")
    request.require_fits(str(file.report["format"]))


def request_of(evaluation: Evaluation) -> EvaluationCreate:
    """Raises AppError for what another release has written, so that it ends its own evaluation and holds up no other."""
    try:
        return EvaluationCreate.model_validate(evaluation.request)
    except ValidationError:
        raise BadRequest("another release has made this evaluation; make it again", code="evaluation_outdated") from None


def get(session: orm.Session, caller: Caller, evaluation_id: str, *, param: str | None = None) -> Evaluation:
    if evaluation := session.scalar(_visible(caller).where(Evaluation.id == evaluation_id)):
        return evaluation
    raise NotFound(
        f"the evaluation {evaluation_id!r} does not exist or is not yours; GET /v1/evaluations lists them",
        param=param,
        code="evaluation_not_found",
    )


def list_page(session: orm.Session, caller: Caller, *, after: str | None, limit: int) -> tuple[Sequence[Evaluation], bool]:
    return pages.fetch(session, _visible(caller), Evaluation.id, after=after, limit=limit)


def list_naming(
    session: orm.Session, caller: Caller, models: Sequence[str], *, file_id: str | None = None, limit: int = MOST_NAMING
) -> Sequence[Evaluation]:
    """Those that ask any of these models, about this file or any, the newest first."""
    query = _visible(caller).where(Evaluation.request["models"].has_any(cast(models, ARRAY(Text))))
    if file_id is not None:
        query = query.where(Evaluation.file_id == file_id)
    return session.scalars(query.order_by(Evaluation.id.desc()).limit(limit)).all()


def list_samples(
    session: orm.Session, caller: Caller, evaluation_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[EvaluationSample], bool]:
    """In the order of the file's rows. A cursor that names no sample of this evaluation shows the first page."""
    evaluation = get(session, caller, evaluation_id)
    mine = select(EvaluationSample).where(
        EvaluationSample.organization_id == evaluation.organization_id, EvaluationSample.evaluation_id == evaluation.id
    )
    position = mine.with_only_columns(EvaluationSample.position).where(EvaluationSample.id == after)
    cursor = session.scalar(position) if after else None
    return pages.fetch(session, mine, EvaluationSample.position, after=cursor, limit=limit, order="asc")


def cancel(session: orm.Session, caller: Caller, evaluation_id: str) -> Evaluation:
    """End it at once: its worker hears of it with its next word, and what has been answered stays. Twice is the same as once."""
    evaluation = get(session, caller, evaluation_id)
    session.refresh(evaluation, with_for_update=True)
    if evaluation.state == EvaluationState.CANCELLED:
        return evaluation
    if evaluation.state not in UNDECIDED:
        raise Conflict(f"evaluation {evaluation.id} has {evaluation.state} and cannot be cancelled", code="illegal_state")
    end(evaluation, EvaluationState.CANCELLED)
    session.flush()
    session.refresh(evaluation)
    return evaluation


def end(evaluation: Evaluation, state: EvaluationState) -> None:
    """It is over, and nobody holds it any more."""
    evaluation.state, evaluation.status_details = state, None
    evaluation.lease_owner = evaluation.lease_expires_at = None
    evaluation.finished_at = func.clock_timestamp()


def _pinned(session: orm.Session, caller: Caller, catalog: Catalog, request: EvaluationCreate) -> EvaluationCreate:
    """With each alias as the model behind it: an alias that is moved meanwhile would mix the answers of two."""
    models = [names.resolve(session, caller, catalog, model, param="models").model for model in request.models]
    if len(set(models)) < len(models):
        raise BadRequest("models holds a model and an alias of it; name each model once", param="models")
    return request.model_copy(update={"models": models})


def _visible(caller: Caller) -> Select[Evaluation]:
    return select(Evaluation).where(
        Evaluation.organization_id == caller.organization_id, Evaluation.project_id == caller.project_id
    )
