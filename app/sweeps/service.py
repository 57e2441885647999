"""Sweeps: jobs made together, and the best of them."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any

from sqlalchemy import Select, func, orm, select

from app import db, idempotency, pages
from app.accounts.caller import Caller
from app.core import ids
from app.core.catalog import Catalog
from app.core.clock import unix
from app.core.errors import AppError, NotFound
from app.core.settings import EvaluationSettings, GpuSettings
from app.core.spec import USUAL, QuantizationName
from app.evaluations import service as evaluations
from app.files import service as files
from app.jobs import comparing, life
from app.jobs import service as jobs
from app.jobs.schemas import status_of
from app.models import Job, JobState, Sweep
from app.models.jobs import UNFINISHED
from app.sweeps import trials
from app.sweeps.schemas import BestOut, EvaluationMetric, SweepCreate, SweepOut, TrialOut


def create(
    session: orm.Session,
    caller: Caller,
    catalog: Catalog,
    *,
    request: SweepCreate,
    tiers: frozenset[str],
    gpu: GpuSettings = GpuSettings(),
    limits: EvaluationSettings = EvaluationSettings(),
    quantizations: Set[QuantizationName] = frozenset({USUAL}),
    is_retry: bool = False,
) -> Sweep:
    """Queue all jobs of a sweep, each as if it came alone, or none. `is_retry`: see jobs.create."""
    wanted = trials.expand(request)
    if isinstance(request.metric, EvaluationMetric):
        files.get_for_evaluation(session, caller, request.metric.file, param="metric.file")
    seed = None if "seed" in request.grid else wanted[0].job.seed
    sweep = Sweep(
        id=ids.new("sweep_"),
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        api_key_id=caller.key_id,
        request=request.model_dump(mode="json", include={"random", "metric"})
        | {"seed": seed, "grid": list(request.grid.items())},
        request_sha256=hashlib.sha256(request.model_dump_json().encode()).hexdigest(),
    )
    db.take_turns(session, caller.key_id + sweep.request_sha256)
    if is_retry and (made := _made_just_now(session, sweep)):
        return made
    make = partial(
        jobs.create,
        session,
        caller,
        catalog,
        tiers=tiers,
        gpu=gpu,
        limits=limits,
        quantizations=quantizations,
        sweep_id=sweep.id,
    )
    sweep.trials = [{"job": _job(make, one), "values": one.values} for one in wanted]
    session.add(sweep)
    session.flush()
    session.refresh(sweep)
    return sweep


def get(session: orm.Session, caller: Caller, sweep_id: str) -> Sweep:
    if sweep := session.scalar(_visible(caller).where(Sweep.id == sweep_id)):
        return sweep
    raise NotFound(
        f"the sweep {sweep_id!r} does not exist or is not yours; GET /v1/fine_tuning/sweeps lists them", code="sweep_not_found"
    )


def list_page(session: orm.Session, caller: Caller, *, after: str | None, limit: int) -> tuple[Sequence[Sweep], bool]:
    """Newest first."""
    return pages.fetch(session, _visible(caller), Sweep.id, after=after, limit=limit)


def cancel(session: orm.Session, caller: Caller, sweep_id: str) -> Sweep:
    """Cancel those of its jobs that have not ended. Twice is the same as once."""
    sweep = get(session, caller, sweep_id)
    unfinished = select(Job.id).where(*_of(caller, [sweep]), Job.state.in_(UNFINISHED)).order_by(Job.id).with_for_update()
    for job_id in session.scalars(unfinished).all():
        jobs.cancel(session, caller, job_id)
    return sweep


def shown(session: orm.Session, caller: Caller, sweeps: Sequence[Sweep]) -> dict[str, SweepOut]:
    """By id, with the jobs as they are now."""
    columns = (Job.id, Job.state, Job.suffix, Job.fine_tuned_model, Job.valid_loss)
    rows = {row.id: row for row in session.execute(select(*columns).where(*_of(caller, sweeps)))}
    told = dict[str, SweepOut]()
    for sweep in sweeps:
        mine = [rows[trial["job"]] for trial in sweep.trials]
        scores = _scores(session, caller, sweep, mine)
        told[sweep.id] = _shown(sweep, [_trial(sweep, row, trial, scores) for row, trial in zip(mine, sweep.trials, strict=True)])
    return told


def _job(make: Callable[..., Job], trial: trials.Trial) -> str:
    try:
        return make(request=trial.job).id
    except AppError as refused:
        raise trials.refusal(refused, trial.number, trial.values) from None


def _made_just_now(session: orm.Session, sweep: Sweep) -> Sweep | None:
    """As of jobs: the sweep that the same key made with the same body in the last minutes."""
    same = (Sweep.api_key_id == sweep.api_key_id, Sweep.request_sha256 == sweep.request_sha256)
    recent = Sweep.created_at > func.clock_timestamp() - idempotency.RETRY_WINDOW
    mine = select(Sweep).where(Sweep.organization_id == sweep.organization_id, *same, recent)
    return session.scalar(mine.order_by(Sweep.id.desc()).limit(1))


def _scores(session: orm.Session, caller: Caller, sweep: Sweep, rows: Sequence[Any]) -> Mapping[str, float | None]:
    """By job, of those that have succeeded."""
    succeeded = [row for row in rows if row.state == JobState.SUCCEEDED]
    metric = sweep.request["metric"]
    if metric["type"] == "valid_loss":
        return {row.id: row.valid_loss for row in succeeded}
    of_model = dict[str, float | None]()
    models = [row.fine_tuned_model for row in succeeded]
    for evaluation in evaluations.list_naming(session, caller, models, file_id=metric["file"]):  # the newest first
        for model in models:
            grades = comparing.grades_of(evaluation, model) or {}
            if model not in of_model and metric["grader"] in grades:
                of_model[model] = grades[metric["grader"]].mean
    return {row.id: of_model.get(row.fine_tuned_model) for row in succeeded}


def _trial(sweep: Sweep, row: Any, trial: Mapping[str, Any], scores: Mapping[str, float | None]) -> TrialOut:
    score = scores.get(row.id)
    return TrialOut(
        job=row.id,
        status=status_of(row.state),
        values={name: trial["values"][name] for name, _ in sweep.request["grid"]},
        user_provided_suffix=row.suffix,
        fine_tuned_model=row.fine_tuned_model,
        score=score if score is not None and math.isfinite(score) else None,
    )


def _shown(sweep: Sweep, told: list[TrialOut]) -> SweepOut:
    request, grid = sweep.request, dict(sweep.request["grid"])
    is_lowest_best = request["metric"]["type"] == "valid_loss"
    has_ended = all(trial.status in life.TERMINAL for trial in told)
    is_scored = all(trial.score is not None for trial in told if trial.status == JobState.SUCCEEDED)
    return SweepOut(
        id=sweep.id,
        created_at=unix(sweep.created_at),
        grid=grid,
        random=request["random"],
        metric=request["metric"],
        seed=request["seed"],
        jobs=told,
        status_counts=Counter(trial.status for trial in told),
        best=best_of(told, is_lowest_best=is_lowest_best),
        is_final=has_ended and (is_lowest_best or is_scored),
    )


def best_of(told: Sequence[TrialOut], *, is_lowest_best: bool) -> BestOut | None:
    """Of those with a score, the first in order among equals; None where none has one."""
    scores = [trial.score for trial in told if trial.score is not None]
    if not scores:
        return None
    score = min(scores) if is_lowest_best else max(scores)
    first, *others = (trial for trial in told if trial.score == score)
    return BestOut(
        job=first.job,
        fine_tuned_model=first.fine_tuned_model,
        values=first.values,
        score=score,
        tied_with=[trial.job for trial in others],
    )


def _of(caller: Caller, sweeps: Sequence[Sweep]) -> tuple[Any, ...]:
    """Their jobs."""
    mine = (Job.organization_id == caller.organization_id, Job.project_id == caller.project_id)
    return (*mine, Job.sweep_id.in_([sweep.id for sweep in sweeps]))


def _visible(caller: Caller) -> Select[Sweep]:
    return select(Sweep).where(Sweep.organization_id == caller.organization_id, Sweep.project_id == caller.project_id)
