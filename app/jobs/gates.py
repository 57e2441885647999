"""From a job's last step to its model's going live: at once, or once an evaluation has let it pass (docs/quality-gate.md)."""

from sqlalchemy import ColumnElement, Select, and_, orm, select

from app import outbox
from app.accounts.caller import Caller
from app.adapters import aliases, names
from app.adapters import service as adapters
from app.core import tracing
from app.core.catalog import Base, Catalog
from app.core.errors import AppError, BadRequest, Conflict
from app.core.manifest import Manifest
from app.core.quality_gate import QualityGate, Stage
from app.core.settings import EvaluationSettings
from app.evaluations import service as evaluations
from app.evaluations.schemas import EvaluationCreate
from app.files import service as files
from app.jobs import events, life, states
from app.jobs.schemas import JobCreate, QualityGateCreate
from app.models import Adapter, Evaluation, EvaluationState, File, FileStatus, Job, JobState
from app.models.evaluations import UNDECIDED

IN_REQUEST = "quality_gate.evaluation"
NEW_MODEL = "the model of the job"


def plan(
    session: orm.Session, caller: Caller, catalog: Catalog, *, base: Base, request: JobCreate, limits: EvaluationSettings
) -> QualityGate | None:
    """The gate of a job to be, None for one without. Raises AppError for what could not be evaluated, or named, in the end."""
    if request.alias:
        aliases.require_free(catalog, request.alias, param="alias")
    asked = request.quality_gate
    if asked is None:
        return None
    against = names.resolve(session, caller, catalog, asked.against or base.id, param="quality_gate.against")
    if against.base.id != base.id:
        message = f"{asked.against} runs on {against.base.id}, and the job on {base.id}; compare with a model on the same base"
        raise BadRequest(message, param="quality_gate.against")
    return QualityGate(
        evaluation=asked.evaluation,
        grader=_grader(session, caller, asked, compared_with=against.model, limits=limits),
        against=against.alias or (against.adapter.name if against.adapter else base.id),
        margin=asked.margin,
        confidence=asked.confidence,
    )


def trained(session: orm.Session, job: Job, *, prefix: str, manifest: Manifest) -> None:
    """The adapter of a running job is in storage and verified: it goes live, or to its gate, and no worker is held by that."""
    name, gate = adapters.name_of(job), gate_of(job)
    adapter = adapters.publish(session, job, name=name, step=None, prefix=prefix, manifest=manifest, is_live=gate is None)
    _prefetch(session, adapter)
    if gate is None:
        _go_live(session, job, name)
        return
    states.move(session, job, JobState.EVALUATING, f"{name} is trained, and goes live once it has passed the quality gate")
    _evaluate(session, job, gate.model_copy(update={"model": name}))


def conclude_next(session: orm.Session) -> bool:
    """Decide about one model whose evaluation is over; False when none waits."""
    job = session.scalar(select(Job).where(decidable()).order_by(Job.id).limit(1).with_for_update(skip_locked=True))
    if job is None:
        return False
    with tracing.span("gate", parent=job.trace, job_id=job.id):
        return _concluded(session, job)


def _concluded(session: orm.Session, job: Job) -> bool:
    gate = gate_of(job)
    assert gate is not None
    run = session.scalars(select(Evaluation).where(Evaluation.id == gate.evaluation_run)).one()
    if run.state in UNDECIDED:  # begun again since the row was looked for
        return False
    if run.state != EvaluationState.SUCCEEDED:
        reason = run.error["message"] if run.error else "the evaluation was cancelled"
        _end(session, job, gate.undecided(f"{run.id}: {reason}"))
    elif _stands_for_another(session, job, gate):
        events.append(session, job, f"{gate.against} has been moved meanwhile: the gate is evaluated again", level="warn")
        _evaluate(session, job, gate)
    else:
        _end(session, job, gate.decided(run.results or {"models": [], "comparisons": []}))
    return True


def decidable() -> ColumnElement[bool]:
    """Whether a job's evaluation is over, and nobody has drawn the conclusion from it."""
    is_under_way = select(Evaluation.id).where(Evaluation.job_id == Job.id, Evaluation.state.in_(UNDECIDED)).exists()
    return and_(Job.state == JobState.EVALUATING, ~is_under_way)


def stop(session: orm.Session, job: Job) -> None:
    """Nobody wants the verdict any more: the evaluation ends, with the answers it has."""
    gate = gate_of(job)
    assert gate is not None
    run = session.scalars(select(Evaluation).where(Evaluation.id == gate.evaluation_run).with_for_update()).one()
    if run.state in UNDECIDED:
        evaluations.end(run, EvaluationState.CANCELLED)
    _keep(job, gate.undecided("the job was cancelled"))


def publish(session: orm.Session, job: Job) -> None:
    """Let a model go live by hand that was kept back. The job stays as it has ended, its alias where it is. Twice is once."""
    if job.fine_tuned_model is not None:
        return
    if job.state not in life.TERMINAL:
        raise life.IllegalMove(f"job {job.id} is not over, and decides itself; wait for it, or cancel it first")
    adapter = session.scalar(_final(job).with_for_update())
    if adapter is None:
        raise Conflict(f"job {job.id} has no model: it ended before it was trained, or the model was deleted", code="no_model")
    adapter.is_live, job.fine_tuned_model = True, adapter.name
    events.append(session, job, f"{adapter.name} was published by hand", level="warn")
    _prefetch(session, adapter)


def gate_of(job: Job) -> QualityGate | None:
    return QualityGate.model_validate(job.quality_gate) if job.quality_gate else None


def _grader(
    session: orm.Session, caller: Caller, asked: QualityGateCreate, *, compared_with: str, limits: EvaluationSettings
) -> str:
    """The one that decides. Raises AppError for an evaluation that could not be made of two models."""
    named = evaluations.get(session, caller, asked.evaluation, param=IN_REQUEST)
    request = _of_two(evaluations.request_of(named), compared_with, NEW_MODEL)
    file = files.get_for_evaluation(session, caller, named.file_id, param=IN_REQUEST)
    if file.status != FileStatus.PROCESSED or file.report is None:
        raise Conflict(f"the file {file.id} of {named.id} is still being validated; try again shortly", param=IN_REQUEST)
    try:
        evaluations.require_possible(file, request, limits)
    except BadRequest as refused:
        raise BadRequest(f"{named.id} cannot be made of two models: {refused}", param=IN_REQUEST, code=refused.code) from None
    graders = [grader.name for grader in request.graders_for(str(file.report["format"]))]
    if asked.grader in graders:
        return asked.grader
    if asked.grader is None and len(graders) == 1:
        return graders[0]
    message = f"{named.id} grades by {', '.join(graders)}: name the one that decides"
    raise BadRequest(message, param="quality_gate.grader")


def _evaluate(session: orm.Session, job: Job, gate: QualityGate) -> None:
    """Begin the evaluation that decides, or give the verdict up if there can be none."""
    caller = _owner(job)
    assert gate.model is not None
    try:
        named = evaluations.get(session, caller, gate.evaluation)
        compared_with = _compared_with(session, job, gate)
        request = _of_two(evaluations.request_of(named), compared_with, gate.model)
        if session.get(File, named.file_id) is None:  # a release that knows no gates may have deleted it
            raise Conflict(f"the file {named.file_id} of {named.id} is gone")
    except AppError as refused:
        _end(session, job, gate.undecided(str(refused)))
        return
    run = evaluations.add(session, caller, request.model_copy(update={"name": f"gate of {job.id}"}), job_id=job.id)
    _keep(job, gate.evaluating(compared_with=compared_with, evaluation_run=run.id))
    events.append(session, job, f"The quality gate is evaluated by {run.id}: {gate.model} against {compared_with}")


def _of_two(request: EvaluationCreate, compared_with: str, model: str) -> EvaluationCreate:
    """The same rows, graders and sampling for these two. Judges that compare answers side by side decide nothing here."""
    return request.model_copy(update={"models": [compared_with, model], "pairwise": None})


def _compared_with(session: orm.Session, job: Job, gate: QualityGate) -> str:
    """The model that `against` stands for now. Raises NotFound."""
    caller = _owner(job)
    if pointed := aliases.pointed(session, caller, gate.against, lock=True):
        return pointed[0]
    if gate.against != job.base and adapters.find(session, caller, gate.against) is None:
        raise adapters.missing(session, caller, gate.against)
    return gate.against


def _stands_for_another(session: orm.Session, job: Job, gate: QualityGate) -> bool:
    """Whether an alias was moved since the evaluation began: what would be replaced is not what was compared with."""
    pointed = aliases.pointed(session, _owner(job), gate.against, lock=True)
    return pointed is not None and pointed[0] != gate.compared_with


def _end(session: orm.Session, job: Job, gate: QualityGate) -> None:
    """The gate has its verdict, or there will be none."""
    _keep(job, gate)
    assert gate.model is not None
    if gate.stage is Stage.PASSED:
        session.scalars(_final(job).with_for_update()).one().is_live = True
        events.append(session, job, f"The quality gate was passed: {gate.told()}")
        _go_live(session, job, gate.model)
        return
    is_failed = gate.stage is Stage.FAILED
    what, code = ("failed", "quality_gate_failed") if is_failed else ("not decided", "quality_gate_undecided")
    message = (
        f"the quality gate was {what}: {gate.told() if is_failed else gate.reason}. The model is kept and not live; "
        f"POST /v1/fine_tuning/jobs/{job.id}/publish makes it live"
    )
    states.fail(session, job, code=code, message=message, param="quality_gate")


def _go_live(session: orm.Session, job: Job, name: str) -> None:
    """The job has succeeded: its model and its alias mean the same from this commit on."""
    job.fine_tuned_model = name
    events.append(session, job, f"New fine-tuned model created: {name}")
    if job.alias:
        aliases.point(session, _owner(job), job.alias, model=name, job_id=job.id)
        events.append(session, job, f"The alias {job.alias} stands for {name}")
    states.move(session, job, JobState.SUCCEEDED, "The job has successfully completed")


def _final(job: Job) -> Select[Adapter]:
    return select(Adapter).where(Adapter.job_id == job.id, Adapter.step.is_(None))


def _keep(job: Job, gate: QualityGate) -> None:
    job.quality_gate = gate.model_dump(mode="json")


def _prefetch(session: orm.Session, adapter: Adapter) -> None:
    outbox.put(session, outbox.Topic.PREFETCH, adapters.ref_of(adapter).model_dump(mode="json"))


def _owner(job: Job) -> Caller:
    """Whoever made the job, in whose name everything here is done."""
    return Caller(job.api_key_id, job.organization_id, job.project_id, job.organization_slug)
