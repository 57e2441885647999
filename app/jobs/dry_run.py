"""What would come of a job, told before there is one: all is looked at and decided as for a job, and nothing is kept."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import orm

from app import db
from app.accounts.caller import Caller
from app.core import cards, data, methods, prices, spec
from app.core.catalog import Base, Catalog
from app.core.clock import unix
from app.core.data import Report
from app.core.data_report import Comparison, DataReport, FileReport
from app.core.errors import AppError, Conflict
from app.core.methods import MethodName
from app.core.preview import RowPreview
from app.core.prices import Price
from app.core.settings import MIB, Settings
from app.core.storage import Storage
from app.core.tokens import keys
from app.files import derived, glance
from app.files import service as files
from app.files.glance import Glance, Sample, Wanted
from app.jobs import admission, queue, starting, throughput
from app.jobs.admission import Admission, Data
from app.jobs.queue import Place
from app.jobs.schemas import JobCreate, PlaceOut, shown_hyperparameters, shown_method, shown_training, told_plan
from app.models import File
from app.places import Places


class Reason(BaseModel):
    """Why the job would be refused, or would fail before it trains."""

    code: str
    message: str
    param: str | None


class Duration(BaseModel):
    """A worker's time for the whole job, at the speed of what was trained on this base in this tier before."""

    seconds: float
    tokens_per_second: float


class DryRunOut(BaseModel):
    """The answer to a dry run. What cannot be told, because of a problem or for want of a measurement, is null.

    `files` holds the first look at each file, `data_report` the second; `plan` and the settings are as a job shows them.
    `sampled` names the files too long to be looked at whole: what is counted, and all that follows from it, is estimated.
    """

    object: Literal["fine_tuning.job.dry_run"] = "fine_tuning.job.dry_run"
    ok: bool
    problems: list[Reason]
    warnings: list[str]
    model: str
    base_model: str
    continue_from: str | None
    training_file: str
    validation_file: str | None
    files: dict[str, Report]
    sampled: dict[str, Sample]
    data_report: DataReport | None
    preview: list[RowPreview]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    adapter: dict[str, Any]
    quantization: dict[str, Any]
    training: dict[str, Any]
    plan: dict[str, Any] | None
    auto: dict[str, Any] | None
    time: Duration | None
    price: Price | None
    queue: PlaceOut | None
    estimated_finish: int | None


@dataclass(frozen=True)
class _Asked:
    """A request, understood. `files` and `reports` are by the name of the API's parameter; a file not validated yet has none."""

    base: Base
    requested: spec.Requested
    seed: int
    files: dict[str, File]
    reports: dict[str, Report]

    @property
    def max_seq_length(self) -> int:
        return spec.max_seq_length(self.requested, self.base)


@dataclass(frozen=True)
class _Seen:
    """What the files gave."""

    reports: dict[str, Report]
    reasons: list[Reason]
    report: DataReport | None = None
    preview: tuple[RowPreview, ...] = ()
    sampled: dict[str, Sample] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class DryRunner:
    """Holds what all dry runs of a process share. No transaction is open while files are looked at."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], storage: Storage, catalog: Catalog, settings: Settings) -> None:
        self._sessions, self._storage, self._catalog, self._settings = sessions, storage, catalog, settings
        self._prices, self._places = prices.load(settings.price_file), Places("dry runs", code="dry_run_busy")

    def run(self, caller: Caller, request: JobCreate) -> DryRunOut:
        """Raises what creating the job would raise, but for what is wrong with its files: that is in the answer. Unavailable."""
        with self._session(caller) as session:
            asked = self._understand(session, caller, request)
        seen = self._look(caller, asked)
        reasons, admitted = list(seen.reasons), None
        try:
            admitted = self._admit(asked, seen)
        except AppError as refused:
            reasons.append(_reason(refused))
        with self._session(caller) as session:
            place = queue.place_of_next(session, admitted.queue) if admitted else None
            duration = _duration(session, asked, admitted)
        hyperparameters = shown_hyperparameters(asked.requested, admitted.spec if admitted else None)
        return DryRunOut(
            ok=not reasons,
            problems=reasons,
            warnings=[*seen.warnings, *(seen.report.warnings() if seen.report else ())],
            model=request.model,
            base_model=asked.base.id,
            continue_from=asked.requested.continue_from.model if asked.requested.continue_from else None,
            training_file=request.training_file,
            validation_file=request.validation_file,
            files=seen.reports,
            sampled=seen.sampled,
            data_report=seen.report,
            preview=list(seen.preview),
            hyperparameters=hyperparameters,
            method=shown_method(asked.requested, hyperparameters),
            adapter=dict(asked.requested.adapter),
            quantization=dict(asked.requested.quantization),
            training=shown_training(asked.requested, admitted.spec if admitted else None),
            **told_plan(admitted.shown() if admitted else None),
            time=duration,
            price=self._prices.price(asked.base.id, admitted.total_tokens) if admitted else None,
            queue=PlaceOut.of(place) if place else None,
            estimated_finish=_finish(place, duration),
        )

    def _session(self, caller: Caller) -> AbstractContextManager[orm.Session]:
        return db.organization_session(self._sessions, caller.organization_id)

    def _understand(self, session: orm.Session, caller: Caller, request: JobCreate) -> _Asked:
        base, requested = starting.understand(session, caller, self._catalog, request)
        training, gpu = self._settings.training, self._settings.gpu
        admission.first_queue(
            base, requested, among=training.tiers, gpu=gpu, catalog=self._catalog, quantizations=training.quantizations
        )
        named = {"training_file": request.training_file, "validation_file": request.validation_file}
        found = {param: files.get(session, caller, file_id, param=param) for param, file_id in named.items() if file_id}
        for param, file in found.items():
            files.require_purpose(file, data.TO_TRAIN, param=param)
        reports = {param: Report.model_validate(file.report) for param, file in found.items() if file.report}
        return _Asked(base, requested, request.seed or 0, found, reports)

    def _look(self, caller: Caller, asked: _Asked) -> _Seen:
        method = asked.requested.method
        known_reasons = [reason for param, file in asked.files.items() for reason in _untrainable(file, method, param)]
        if known_reasons:
            return _Seen(asked.reports, known_reasons)
        facts = cards.read_facts(self._storage, asked.base.id)
        known = self._known(caller, asked, facts)
        wanted = Wanted(
            files=asked.files,
            formats=methods.FORMATS[method],
            base=asked.base.id,
            card_facts=facts,
            max_seq_length=asked.max_seq_length,
            options=asked.requested.training,
            seed=asked.seed,
            examines=len(asked.reports) < len(asked.files),
            previews=known is not None,
        )
        try:
            with self._places.take(caller.organization_id):
                glanced = glance.look(self._storage, wanted)
        except glance.Damaged as damaged:
            return _Seen(asked.reports, [_reason(damaged)])
        return _seen(asked, glanced) if known is None else _Seen(asked.reports, [], known, glanced.answer.preview)

    def _known(self, caller: Caller, asked: _Asked, card_facts: bytes) -> DataReport | None:
        """What a job with the same files has found out of all their rows. A split depends on the seed, and is not looked for."""
        options = asked.requested.training
        if options.validation_split is not None:
            return None
        sets = {
            param: keys.of_set(file.sha256, card_facts, max_seq_length=asked.max_seq_length, long_rows=options.long_rows)
            for param, file in asked.files.items()
        }
        likeness = keys.of_likeness(*sets.values())
        with self._session(caller) as session:
            known = derived.look_up(session, caller.organization_id, {*sets.values(), likeness})
        if likeness not in known or not known.keys() >= set(sets.values()):
            return None
        reports = {param: FileReport.model_validate(known[key].facts) for param, key in sets.items()}
        return DataReport(
            training=reports["training_file"],
            validation=reports.get("validation_file"),
            likeness=Comparison.model_validate(known[likeness].facts),
        )

    def _admit(self, asked: _Asked, seen: _Seen) -> Admission | None:
        """Raises BadRequest."""
        if seen.report is None:
            return None
        scales = {param: sample.scale for param, sample in seen.sampled.items()}
        training = scales.get("training_file", 1.0)
        validation = scales.get("validation_file", 1.0) if "validation_file" in asked.files else training
        return admission.admit(
            asked.base,
            asked.requested,
            Data.of(seen.report).scaled(training, validation),
            seed=asked.seed,
            among=self._settings.training.tiers,
            gpu=self._settings.gpu,
            catalog=self._catalog,
        )


def _untrainable(file: File, method: MethodName, param: str) -> Iterator[Reason]:
    try:
        files.require_trainable(file, method, param=param)
    except Conflict as refused:
        yield _reason(refused)


def _seen(asked: _Asked, glanced: Glance) -> _Seen:
    answer, sampled = glanced.answer, glanced.sampled
    reasons = [reason for param, report in answer.examined.items() for reason in _unfit(asked, report, param)]
    warnings = [*_of_samples(asked, sampled), *filter(None, [glanced.unfinished])]
    if answer.refused and sampled:  # rows further on may do
        warnings.append(f"of the rows that were looked at: {answer.refused.message}")
    elif answer.refused:
        reasons.append(Reason(code="invalid_file", message=answer.refused.message, param=answer.refused.param))
    report = None
    if answer.training is not None and answer.likeness is not None:
        report = DataReport(training=answer.training, validation=answer.validation, split=answer.split, likeness=answer.likeness)
    return _Seen(answer.examined | asked.reports, reasons, report, answer.preview, sampled, warnings)


def _unfit(asked: _Asked, report: Report, param: str) -> Iterator[Reason]:
    """Why a file that was examined just now cannot be trained on."""
    file = asked.files[param]
    if not report.is_valid:
        yield Reason(code="invalid_file", message=f"{file.id} is not valid: {report.summary()}", param=param)
        return
    try:
        files.require_trained_format(report.format, file.id, asked.requested.method, param=param)
    except Conflict as refused:
        yield _reason(refused)


def _reason(refused: AppError) -> Reason:
    return Reason(code=refused.code or "invalid_value", message=str(refused), param=refused.param)


def _of_samples(asked: _Asked, sampled: Mapping[str, Sample]) -> Iterator[str]:
    for param, sample in sampled.items():
        read, whole = sample.bytes / MIB, sample.of_bytes / MIB
        unread = "" if param in asked.reports else "; what is wrong with later rows is seen when the file has been validated"
        yield (
            f"{param}: the first {sample.rows} rows were looked at, {read:.1f} of {whole:.1f} MiB; counts, time and price are "
            f"estimated from them, and a longer row further on takes more memory{unread}"
        )


def _duration(session: orm.Session, asked: _Asked, admitted: Admission | None) -> Duration | None:
    if admitted is None:
        return None
    speed = throughput.tokens_per_second(session, queue=admitted.queue, base=asked.base.id)
    if not speed:
        return None
    return Duration(seconds=admitted.work_tokens / speed, tokens_per_second=speed / methods.work(admitted.spec.method))


def _finish(place: Place | None, duration: Duration | None) -> int | None:
    started = unix(place.starts_at) if place else None
    return round(started + duration.seconds) if started is not None and duration else None
