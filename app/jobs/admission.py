"""Whether a job can be trained here, where, and how: decided when its data is known, refused before where no data could help."""

from collections.abc import Set
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.core import auto, memory, methods, planner, spec, tiers
from app.core.auto import Chosen
from app.core.catalog import Base, Catalog
from app.core.data_report import DataReport
from app.core.errors import BadRequest
from app.core.memory import GIB
from app.core.planner import Plan, Run
from app.core.settings import GpuSettings
from app.core.spec import QUANTIZATIONS, USUAL, QuantizationName, QuantizationSpec, Requested, TrainSpec


class NoRoom(BadRequest):
    """No worker of this installation has the memory; the message says what would fit."""

    code = "no_room"


class NotServed(BadRequest):
    """No engine of this installation holds bases so: what is trained could not be served."""

    code = "unsupported_parameter"


class Data(BaseModel):
    """What of a tokenised data set decides a run, or is told of it. Lengths are in tokens; `longest` is that of all rows, both
    answers of a pair together; `good` are the examples whose answers were rated so.

    `examples`, `dropped`, `truncated` and tokens are those of training, `validation` counts the examples that are not trained on.
    """

    model_config = ConfigDict(frozen=True)

    examples: int
    dropped: int = 0
    truncated: int = 0
    validation: int = 0
    tokens: int
    trained_tokens: int
    longest: int
    good: int = 0

    @classmethod
    def of(cls, report: DataReport) -> "Data":
        training, validation = report.trained_on, report.validated_on
        return cls(
            examples=training.examples,
            dropped=report.training.left_out_count,
            truncated=report.training.rows_cut,
            validation=validation.examples if validation else 0,
            tokens=training.tokens,
            trained_tokens=training.trained_tokens,
            longest=max(training.longest, validation.longest if validation else 0),
            good=training.rated_good,
        )

    def scaled(self, training: float, validation: float) -> "Data":
        """Of whole files, where this is of their beginnings: lengths stay, since nobody knows better."""
        counted = ("examples", "dropped", "truncated", "tokens", "trained_tokens", "good")
        counts = {name: round(getattr(self, name) * training) for name in counted}
        return self.model_copy(update=counts | {"validation": round(self.validation * validation)})


class Admission(BaseModel):
    """A job with every `auto` resolved, and its place."""

    model_config = ConfigDict(frozen=True)

    spec: TrainSpec
    plan: Plan
    data: Data
    adapter_parameters: int
    auto: dict[str, Chosen]

    @property
    def queue(self) -> str:
        return f"train.{self.plan.room.tier}"

    @property
    def total_tokens(self) -> int:
        return self.spec.n_epochs * self.data.tokens

    @property
    def work_tokens(self) -> int:
        """Those of a supervised run that takes as long."""
        return round(self.total_tokens * methods.work(self.spec.method))

    def shown(self) -> dict[str, Any]:
        """What the job will do, in numbers its owner can check: the `plan` of a job."""
        plan, data = self.plan, self.data
        return {
            "examples": data.examples,
            "dropped_examples": data.dropped,
            "truncated_examples": data.truncated,
            "validation_examples": data.validation,
            "tokens_per_epoch": data.tokens,
            "trained_tokens_per_epoch": data.trained_tokens,
            "total_steps": self.spec.total_steps(data.examples),
            "adapter_parameters": self.adapter_parameters,
            "tier": plan.room.tier,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "accumulation": plan.accumulation,
            "is_checkpointing": plan.is_checkpointing,
            "predicted_peak_bytes": plan.memory.peak_bytes,
            "predicted_bytes": plan.memory.model_dump(),
            "usable_bytes": plan.room.usable_bytes,
            "reserved_bytes": plan.room.reserved_bytes,
            "auto": {name: chosen.model_dump() for name, chosen in self.auto.items()},
        }


def admit(
    base: Base, requested: Requested, data: Data, *, seed: int, among: Set[str], gpu: GpuSettings, catalog: Catalog
) -> Admission:
    """The smallest of the tiers `among` which this installation chooses that has room, and the run as it fits there.

    A value from values: nothing is queued or kept by it. Raises NoRoom; BadRequest for a base that no worker holds.
    """
    resolved = spec.resolve(requested, base, seed=seed, examples=data.examples, longest=data.longest, good=data.good)
    run = Run(
        model=base.architecture,
        lora=resolved.lora,
        quantization=resolved.quantization,
        optimizer=resolved.optimizer.kind,
        keeps_start=resolved.keeps_start,
        longest_tokens=data.longest,
        documents=2 if "preference" in methods.FORMATS[requested.method] else 1,
        mean_tokens=data.tokens / data.examples,
        batch_size=resolved.batch_size,
    )
    plan = _placed(run, base, among, gpu, catalog, is_continued=resolved.continue_from is not None)
    return Admission(
        spec=resolved.model_copy(update={"micro_batch_tokens": plan.micro_batch_tokens}),
        plan=plan,
        data=data,
        adapter_parameters=memory.adapter_parameters(base.architecture, resolved.lora),
        auto=auto.explain(requested, resolved, base, plan, examples=data.examples, good=data.good),
    )


def first_queue(
    base: Base,
    requested: Requested,
    *,
    among: Set[str],
    gpu: GpuSettings,
    catalog: Catalog,
    quantizations: Set[QuantizationName] = frozenset({USUAL}),
) -> str:
    """Of the smallest tier that would hold the run if its rows were short: a larger one may be chosen once they are known.

    Raises NoRoom; NotServed for what is not among `quantizations`; BadRequest for a base that no worker holds.
    """
    _require_served(requested.quantization, quantizations)
    shortest = Run(
        model=base.architecture,
        lora=requested.adapter,
        quantization=requested.quantization,
        optimizer=requested.training.optimizer,
        longest_tokens=planner.FEWEST,
        mean_tokens=1,
        batch_size=1,
    )
    is_continued = requested.continue_from is not None
    return f"train.{_placed(shortest, base, among, gpu, catalog, is_continued=is_continued).room.tier}"


def _require_served(asked: QuantizationSpec, served: Set[QuantizationName]) -> None:
    if asked.name in served:
        return
    has_scheme = any(QUANTIZATIONS[name].scheme == asked.scheme for name in served)
    raise NotServed(
        f"no engine here holds a base in {asked.name}, and an adapter must meet the base it was trained on; engines hold "
        f"{', '.join(sorted(served))}: ask for one of these, or have an engine started with "
        f"TUNESMITH_INFERENCE__QUANTIZATION={asked.name} and {asked.name} added to TUNESMITH_TRAINING__QUANTIZATIONS",
        param="quantization.double_quant" if has_scheme else "quantization.scheme",
    )


def _placed(run: Run, base: Base, among: Set[str], gpu: GpuSettings, catalog: Catalog, *, is_continued: bool) -> Plan:
    rooms = [tiers.room(tier, gpu) for tier in tiers.holding(base, among)]
    has = ", ".join("cpu" if tier == tiers.CPU else f"{tier} GB" for tier in sorted(among))
    if not rooms:
        message = f"{base.id} needs a GPU worker of {base.tier} GB; this installation has: {has}"
        raise BadRequest(message, param="model", code="no_worker_for_model")
    if run.needs_gpu and not (rooms := [room for room in rooms if room.device != "cpu"]):
        message = f"{run.optimizer} needs a GPU, whose driver pages the states; this installation has: {has}; use adamw_8bit"
        raise BadRequest(message, param="training.optimizer", code="unsupported_parameter")
    plan = planner.plan(run, rooms)
    if not plan.fits:
        raise _no_room(run, plan, catalog, is_continued=is_continued)
    return plan


def _no_room(run: Run, plan: Plan, catalog: Catalog, *, is_continued: bool) -> NoRoom:
    """The base and the shape of a model that is continued cannot be chosen."""
    largest = plan.room
    usable, needed = (largest.usable_bytes or 0) / GIB, plan.memory.peak_bytes / GIB
    held = [base for base in catalog.values() if tiers.holding(base, {largest.tier})]
    would_fit = planner.remedies(run, largest, bases=held)
    if is_continued:
        would_fit = tuple(one for one in would_fit if one.param not in ("model", "adapter.rank", "adapter.use_dora"))
    first = would_fit[0].param if would_fit else "model"
    otherwise = "continue a smaller model" if is_continued else "choose a smaller base model"
    advice = f"what would fit: {', or '.join(map(str, would_fit))}" if would_fit else otherwise
    has = f"the largest worker, of {largest.tier} GB, has {usable:.1f} GiB for it"
    return NoRoom(f"this run needs about {needed:.1f} GiB and {has}; {advice}", param=first)
