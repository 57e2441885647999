"""The form that makes a job: its fields as the API's body, and bases with the memory that they take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.core import planner, tiers
from app.core.catalog import Base, Catalog
from app.core.errors import AppError
from app.core.planner import Run
from app.core.settings import GpuSettings
from app.core.spec import LoraSpec
from app.dashboard import jobs
from app.dashboard.forms import number
from app.handlers import first_problem
from app.jobs.schemas import JobCreate
from app.models import Job

USUAL_TOKENS, USUAL_BATCH = 1024, 8  # of the rows that cards are sized for
_NUMBERS = {
    *("n_epochs", "batch_size", "seed", "rank", "max_seq_length", "checkpoint_every_steps", "validation_split"),
    *("learning_rate", "alpha", "dropout", "beta"),
}
LABELS = {
    "suffix": "The name",
    "n_epochs": "Epochs",
    "batch_size": "Batch size",
    "seed": "Seed",
    "rank": "LoRA rank",
    "alpha": "LoRA alpha",
    "dropout": "LoRA dropout",
    "learning_rate": "Learning rate",
    "max_seq_length": "Longest row",
    "checkpoint_every_steps": "Checkpoint every",
    "validation_split": "What is held back",
    "beta": "Beta",
}
_ADAPTER = ("rank", "alpha", "dropout")
_PLAIN = ("model", "training_file", "validation_file", "suffix", "seed")
_HYPERPARAMETERS = ("n_epochs", "batch_size")
FIELDS = frozenset({*_NUMBERS, "model", "training_file", "validation_file", "suffix", "method", "long_rows", "publish"})
_TRAINING = ("learning_rate", "max_seq_length", "checkpoint_every_steps", "long_rows", "validation_split", "publish")


@dataclass(frozen=True)
class Fit:
    """What a usual run on a base takes of a tier, in bytes. Nothing is planned on a CPU: then both are null."""

    tier: str
    peak_bytes: int | None
    usable_bytes: int | None
    fits: bool


@dataclass(frozen=True)
class BaseCard:
    base: Base
    fits: tuple[Fit, ...]

    @property
    def is_held(self) -> bool:
        """Whether a worker here can train it."""
        return any(fit.fits for fit in self.fits)


def cards(catalog: Catalog, *, among: frozenset[str], gpu: GpuSettings) -> list[BaseCard]:
    """Those that can be trained here come first, the smallest before the others."""
    made = [BaseCard(base, tuple(_fits(base, among, gpu))) for base in catalog.values()]
    return sorted(made, key=lambda card: (not card.is_held, card.base.architecture.linear_parameters))


def _fits(base: Base, among: frozenset[str], gpu: GpuSettings) -> Iterator[Fit]:
    run = Run(
        model=base.architecture,
        lora=LoraSpec(),
        longest_tokens=min(USUAL_TOKENS, base.context_length),
        mean_tokens=min(USUAL_TOKENS, base.context_length),
        batch_size=USUAL_BATCH,
    )
    for tier in sorted(among, key=lambda tier: 0 if tier == tiers.CPU else int(tier)):
        plan = planner.plan(run, [tiers.room(tier, gpu)])
        is_held = tier in tiers.holding(base, [tier])
        if tier == tiers.CPU:
            yield Fit(tier, None, None, is_held)
        else:
            yield Fit(tier, plan.memory.peak_bytes, plan.room.usable_bytes, plan.fits and is_held)


def in_words(error: AppError) -> str:
    """With the field's own label in place of the API's name for it."""
    message, param = str(error), error.param or ""
    label = LABELS.get(param.rpartition(".")[2])
    return label + message.removeprefix(param) if label and message.startswith(param) else message


def values_of(job: Job) -> dict[str, str]:
    """The form that would make such a job again: what was left to us stays empty."""
    settings = {name.rpartition(".")[2]: str(value) for name, value in jobs.asked(job).items()}
    named = {"model": job.base, "training_file": job.training_file_id, "validation_file": job.validation_file_id}
    mine = named | {"suffix": job.suffix, "method": job.request.get("method")} | settings
    return {name: value for name, value in mine.items() if value and name in FIELDS}


def asked(form: Mapping[str, str], *, dry_run: bool) -> JobCreate:
    """The body that this form stands for: an empty field is left to us. Raises BadRequest, naming the field."""
    written = {name: text.strip() for name, text in form.items() if text.strip()}
    said = {name: number(text) if name in _NUMBERS else text for name, text in written.items()}
    method = str(said.pop("method", "supervised"))
    hyperparameters = {name: said[name] for name in _HYPERPARAMETERS if name in said}
    if method != "supervised" and "beta" in said:
        hyperparameters["beta"] = said["beta"]
    body: dict[str, Any] = {name: said[name] for name in _PLAIN if name in said}
    body |= {
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "adapter": {name: said[name] for name in _ADAPTER if name in said},
        "training": {name: said[name] for name in _TRAINING if name in said},
        "dry_run": dry_run,
    }
    try:
        return JobCreate.model_validate(body)
    except ValidationError as error:
        raise first_problem(error.errors()) from None
