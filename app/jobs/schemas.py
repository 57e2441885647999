from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from app.core import spec
from app.core.clock import unix
from app.core.data_report import brief
from app.core.errors import BadRequest
from app.core.methods import METHODS, MethodName
from app.jobs.integrations import Integration
from app.jobs.queue import Place, Queue
from app.models import Job, JobCheckpoint, JobEvent, JobState
from app.schemas import Failure, Request, without_nul

MAX_LISTED = 100  # jobs of a queue


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64), AfterValidator(without_nul)],
        Annotated[str, StringConstraints(max_length=512), AfterValidator(without_nul)],
    ],
    Field(max_length=16),
]


class Supervised(Request):
    hyperparameters: spec.Hyperparameters | None = None


class PreferenceHyperparameters(spec.Hyperparameters):
    beta: spec.Auto | spec.Beta = spec.AUTO


class Preference(Request):
    hyperparameters: PreferenceHyperparameters | None = None


class RatedHyperparameters(PreferenceHyperparameters):
    desirable_weight: spec.Auto | spec.RatedWeight = spec.AUTO
    undesirable_weight: spec.Auto | spec.RatedWeight = spec.AUTO


class Rated(Request):
    hyperparameters: RatedHyperparameters | None = None


class Method(Request):
    """A client may send several of the objects: the one `type` names counts."""

    type: str
    supervised: Supervised | None = None
    dpo: Preference | None = None
    orpo: Preference | None = None
    kto: Rated | None = None
    reinforcement: dict[str, Any] | None = None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that the client named."""
        of_type: Supervised | Preference | Rated | None = getattr(self, self.type)
        return of_type.hyperparameters.model_dump(exclude_unset=True) if of_type and of_type.hyperparameters else {}


class JobCreate(Request):
    """What `POST /v1/fine_tuning/jobs` takes. `adapter`, `quantization`, `training`, `continue_from` and `dry_run` are ours.

    `model` is a base, or one of your own models: then it is what `continue_from` says.
    """

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: spec.Hyperparameters | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    adapter: spec.LoraSpec = spec.LoraSpec()
    quantization: spec.QuantizationSpec = spec.QuantizationSpec()
    training: spec.TrainingOptions = spec.TrainingOptions()
    continue_from: Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(without_nul)] | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _offered(self) -> "JobCreate":
        if self.method and self.method.type not in METHODS:
            message = f"method {self.method.type[:32]!r} is not offered here; use one of {', '.join(METHODS)}"
            raise BadRequest(message, param="method.type", code="unsupported_method")
        types = [integration.type for integration in self.integrations or ()]
        if twice := next((type for type in types if types.count(type) > 1), None):
            raise BadRequest(f"the integration {twice!r} is there twice; send one of each type", param="integrations")
        if self.validation_file and self.training.validation_split is not None:
            message = "validation_file and training.validation_split both say what to validate with; send one of them"
            raise BadRequest(message, param="training.validation_split")
        if self.training.judges and not self.validation_file and self.training.validation_split is None:
            param = "training.early_stopping" if self.training.early_stopping else "training.publish"
            message = f"{param} goes by the validation loss; send a validation_file or training.validation_split too"
            raise BadRequest(message, param=param)
        return self

    @model_validator(mode="after")
    def _said_once(self) -> "JobCreate":
        old, of_method = self._hyperparameters()
        for name in old.keys() & of_method.keys():
            if old[name] != of_method[name]:
                message = f"hyperparameters.{name} and method.{self.method_name}.hyperparameters.{name} differ; send one of them"
                raise BadRequest(message, param=f"hyperparameters.{name}")
        return self

    def _hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those that the client named, in the older place and in `method`."""
        old = self.hyperparameters.model_dump(exclude_unset=True) if self.hyperparameters else {}
        return old, self.method.hyperparameters if self.method else {}

    @property
    def method_name(self) -> MethodName:
        return cast(MethodName, self.method.type) if self.method else "supervised"

    def requested(self) -> spec.Requested:
        """The settings, wherever the client put them: in `method`, or in the older `hyperparameters`."""
        old, of_method = self._hyperparameters()
        of_answers = {name: of_method.pop(name) for name in spec.OF_ANSWERS if name in of_method}
        return spec.Requested(
            method=self.method_name,
            hyperparameters=spec.Hyperparameters.model_validate(old | of_method),
            **of_answers,
            adapter=self.adapter,
            quantization=self.quantization,
            training=self.training,
        )


class PlaceOut(BaseModel):
    """Where a waiting job stands: 1 is taken next. `estimated_start` is null until jobs on such bases have been finished here."""

    name: str
    position: int
    estimated_start: int | None

    @classmethod
    def of(cls, place: Place) -> "PlaceOut":
        return cls(name=place.queue, position=place.position, estimated_start=unix(place.starts_at))


class JobOut(BaseModel):
    """The SDK's FineTuningJob, and what we add: the real base, the resolved settings, progress, the place in the queue.

    `integrations` holds what the SDK's type knows, `trackers` all that were asked for.
    `auto` tells of each setting that was left to us its `value` and the `reason`; null until the files have been looked at.
    `held_out` and `examined` tell what the run has come to, once it has: docs/metrics.md. One of a page leaves `examined` out.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    status: str
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    error: Failure | None
    fine_tuned_model: str | None
    finished_at: int | None
    trained_tokens: int | None
    estimated_finish: int | None
    integrations: list[Any] | None
    trackers: list[Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    paused: bool
    base_model: str
    continue_from: str | None
    sweep: str | None
    adapter: dict[str, Any]
    quantization: dict[str, Any]
    training: dict[str, Any]
    plan: dict[str, Any] | None
    auto: dict[str, Any] | None
    data_report: dict[str, Any] | None
    held_out: dict[str, Any] | None
    examined: dict[str, Any] | None
    started_at: int | None
    step: int
    attempt: int
    queue: PlaceOut | None

    @classmethod
    def of(cls, job: Job, place: Place | None = None, *, is_listed: bool = False) -> "JobOut":
        """`place` is for a job that waits. One of a page leaves out the rows that its `data_report` lists."""
        requested = spec.Requested.model_validate(job.request)
        resolved = spec.TrainSpec.model_validate(job.spec) if job.spec else None
        hyperparameters = shown_hyperparameters(requested, resolved)
        trackers = job.integrations or []
        return cls(
            id=job.id,
            created_at=unix(job.created_at),
            status=status_of(job.state),
            model=job.requested_model,
            organization_id=job.organization_id,
            result_files=[job.result_file_id, *(job.further_result_file_ids or [])] if job.result_file_id else [],
            seed=job.seed,
            training_file=job.training_file_id,
            validation_file=job.validation_file_id,
            hyperparameters=hyperparameters,
            method=shown_method(requested, hyperparameters),
            error=Failure.model_validate(job.error) if job.error else None,
            fine_tuned_model=job.fine_tuned_model,
            finished_at=unix(job.finished_at),
            trained_tokens=job.trained_tokens,
            estimated_finish=unix(place.ends_at if place else job.estimated_finish_at),
            integrations=[one for one in trackers if one["type"] == "wandb"] or None,
            trackers=trackers,
            metadata=job.user_metadata,
            user_provided_suffix=job.suffix,
            paused=job.state == JobState.PAUSED,
            base_model=job.base,
            continue_from=job.continue_from,
            sweep=job.sweep_id,
            adapter=dict(requested.adapter),
            quantization=dict(requested.quantization),
            training=shown_training(requested, resolved),
            **told_plan(job.plan),
            data_report=brief(job.data_report) if job.data_report and is_listed else job.data_report,
            held_out=job.held_out,
            examined=None if is_listed else shown_examined(job),
            started_at=unix(job.started_at),
            step=job.step,
            attempt=job.attempt,
            queue=PlaceOut.of(place) if place else None,
        )


class QueuedJobOut(BaseModel):
    """A job of the caller's that waits, or that a worker has: then it has no position any more."""

    id: str
    status: str
    position: int | None
    estimated_start: int | None
    estimated_finish: int | None


class QueueOut(BaseModel):
    """The jobs that wait for workers of one tier. The numbers are everybody's; `jobs` are the caller's own, at most 100 of them.

    `next` is where a job would stand that came now.
    """

    id: str
    object: Literal["queue"] = "queue"
    tier: str
    waiting: int
    running: int
    next: PlaceOut
    jobs: list[QueuedJobOut]
    has_more_jobs: bool

    @classmethod
    def of(cls, queue: Queue) -> "QueueOut":
        return cls(
            id=queue.id,
            tier=queue.id.removeprefix("train."),
            waiting=queue.waiting,
            running=queue.running,
            next=PlaceOut.of(queue.next),
            jobs=[
                QueuedJobOut(
                    id=job.id,
                    status=job.state,
                    position=place.position if place else None,
                    estimated_start=unix(place.starts_at) if place else None,
                    estimated_finish=unix(place.ends_at if place else job.estimated_finish_at),
                )
                for job, place in queue.jobs[:MAX_LISTED]
            ],
            has_more_jobs=len(queue.jobs) > MAX_LISTED,
        )


class EventOut(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None
    sequence: int

    @classmethod
    def of(cls, event: JobEvent) -> "EventOut":
        return cls(
            id=event.id,
            created_at=unix(event.created_at),
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data,
            sequence=event.sequence,
        )


class CheckpointOut(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: JobCheckpoint) -> "CheckpointOut":
        return cls(
            id=checkpoint.id,
            created_at=unix(checkpoint.created_at),
            fine_tuned_model_checkpoint=checkpoint.fine_tuned_model,
            fine_tuning_job_id=checkpoint.job_id,
            step_number=checkpoint.step,
            metrics={"step": checkpoint.step, **checkpoint.metrics},
        )


def status_of(state: str) -> str:
    """In the API's words."""
    return JobState.QUEUED if state == JobState.PAUSED else state


def told_plan(plan: dict[str, Any] | None) -> dict[str, Any]:
    """`plan` and `auto` of what Admission.shown gave."""
    if plan is None:
        return {"plan": None, "auto": None}
    return {"plan": {name: value for name, value in plan.items() if name != "auto"}, "auto": plan.get("auto")}


def shown_examined(job: Job) -> dict[str, Any] | None:
    """Rows are told by file and line: those that were split off for validation lie in the training file."""
    if job.examined is None:
        return None
    files = {"training": job.training_file_id, "validation": job.validation_file_id or job.training_file_id}
    lists = {name: [{"file": files[row["split"]], **row} for row in job.examined[name]] for name in ("hardest", "suspicious")}
    return {**job.examined, **lists}


def shown_hyperparameters(requested: spec.Requested, resolved: spec.TrainSpec | None) -> dict[str, Any]:
    """What was asked, with `auto` replaced as soon as it is known what it became."""
    shown = requested.hyperparameters.model_dump(mode="json")
    if resolved:
        shown |= {"n_epochs": resolved.n_epochs, "batch_size": resolved.batch_size}
        if shown["learning_rate_multiplier"] == spec.AUTO:
            shown["learning_rate_multiplier"] = 1.0
    if requested.method != "supervised":
        told = resolved.preference if resolved and resolved.preference else requested
        names = spec.OF_ANSWERS if requested.method == "kto" else ("beta",)
        shown |= {name: getattr(told, name) for name in names}
    return shown


def shown_method(requested: spec.Requested, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": requested.method, requested.method: {"hyperparameters": hyperparameters}}


def shown_training(requested: spec.Requested, resolved: spec.TrainSpec | None) -> dict[str, Any]:
    shown = dict(requested.training)  # `model_dump` leaves out what is as it always was
    if resolved:
        shown |= {
            "learning_rate": resolved.optimizer.learning_rate,
            "max_seq_length": resolved.max_seq_length,
            "checkpoint_every_steps": resolved.checkpoint_every_steps,
        }
    return shown
