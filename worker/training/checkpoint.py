"""Checkpoints: an adapter directory anybody may use, and beside it what is needed to go on training it.

    step-000120/adapter/   as worker.model.adapter writes it; the fp32 masters are in it
    step-000120/state/     optimizer.safetensors, state.json, manifest.json

Order of data, dropout and rate follow from seed and step, so they need no state.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from app.core import checkpoints, manifest
from app.core.manifest import Damaged, Manifest
from app.core.spec import TrainSpec
from worker.model import adapter
from worker.model.adapter import AdapterRefused
from worker.model.base import LoadedBase
from worker.model.directory import written_whole
from worker.training.data import Step
from worker.training.failures import Diverged
from worker.training.optim import Optimizer
from worker.training.trainee import Trainee

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


class TrainState(BaseModel):
    """How far a run is, between two steps. `metrics` are those of the last step and of the last evaluation.

    `rate_scale` is what the schedule's rate is multiplied with: less than one in a run that has diverged before. `judged_step` is
    that of the last evaluation, `best_step` of the one with the lowest loss; `stale` counts evaluations since `loss_to_beat`.
    """

    model_config = ConfigDict(frozen=True)

    step: int = 0
    trained_tokens: int = 0
    skipped_in_a_row: int = 0
    rate_scale: float = 1.0
    metrics: dict[str, float] = {}
    judged_step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    loss_to_beat: float = math.inf
    stale: int = 0

    def advanced(self, step: Step, metrics: dict[str, float]) -> "TrainState":
        tokens = self.trained_tokens + step.tokens
        evaluated = {name: value for name, value in self.metrics.items() if name.startswith("valid_")}
        changes = {"step": step.number, "trained_tokens": tokens, "skipped_in_a_row": 0, "metrics": {**evaluated, **metrics}}
        return self.model_copy(update=changes)

    def slowed(self, rate_scale: float) -> "TrainState":
        return self.model_copy(update={"rate_scale": min(self.rate_scale, rate_scale)})

    def judged(self, *, valid_loss: float, valid_mean_token_accuracy: float, min_delta: float = 0.0) -> "TrainState":
        """With what an evaluation has found."""
        found = {"valid_loss": valid_loss, "valid_mean_token_accuracy": valid_mean_token_accuracy}
        changes = {"metrics": {**self.metrics, **found}, "judged_step": self.step, "stale": self.stale + 1}
        if valid_loss < self.best_loss:
            changes |= {"best_step": self.step, "best_loss": valid_loss}
        if valid_loss < self.loss_to_beat - min_delta:
            changes |= {"loss_to_beat": valid_loss, "stale": 0}
        return self.model_copy(update=changes)

    def is_spent(self, spec: TrainSpec) -> bool:
        """Whether the run has stopped early."""
        return spec.early_stopping is not None and self.stale >= spec.early_stopping.patience

    def skipped(self, step: Step) -> "TrainState":
        return self.model_copy(update={"step": step.number, "skipped_in_a_row": self.skipped_in_a_row + 1})


@dataclass(frozen=True)
class Identity:
    """What makes a run this run and no other: a checkpoint of another one is not gone on from."""

    spec: TrainSpec
    base: LoadedBase
    dataset_sha256: str

    @property
    def digest(self) -> str:
        said = [self.spec.model_dump_json(), self.base.entry.digest, self.dataset_sha256]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def write_adapter(self, directory: Path, trainee: Trainee, state: TrainState, *, kind: str) -> Manifest:
        """See adapter.write. Raises Diverged."""
        try:
            return adapter.write(
                directory,
                trainee.model,
                base=self.base.entry,
                spec=self.spec,
                renderer=self.base.renderer,
                dataset_sha256=self.dataset_sha256,
                step=state.step,
                metrics=state.metrics,
                kind=kind,
            )
        except AdapterRefused as error:
            raise Diverged(f"the trained adapter cannot be used: {error}; try a lower learning rate") from error


def write(directory: Path, identity: Identity, trainee: Trainee, optimizer: Optimizer, state: TrainState) -> Path:
    """Write the checkpoint of this step under `directory`, whole or not at all."""
    final = directory / f"step-{state.step:06d}"
    with written_whole(final) as partial:
        of_adapter = identity.write_adapter(partial / "adapter", trainee, state, kind="checkpoint")
        with written_whole(partial / "state") as beside:
            save_file(optimizer.state(), beside / _OPTIMIZER)
            (beside / _STATE).write_text(json.dumps({"run": identity.digest, "state": state.model_dump()}))
            files = {name: manifest.entry_of(beside / name) for name in (_OPTIMIZER, _STATE)}
            of_state = of_adapter.model_copy(update={"kind": "training-state", "files": files})
            (beside / manifest.NAME).write_bytes(of_state.to_bytes())
    return final


def restore(
    directory: Path, identity: Identity, trainee: Trainee, optimizer: Optimizer, *, on_damaged: Callable[[int, str], None]
) -> TrainState | None:
    """Take over the newest checkpoint that is whole and of this run; None when there is none. What was half written goes."""
    for leftover in directory.glob(".step-*"):
        shutil.rmtree(leftover)
    found = _found(directory)
    for step in sorted(found, reverse=True):
        try:
            return _open(found[step], identity, trainee, optimizer)
        except Damaged as error:
            on_damaged(step, str(error))
    return None


def _open(checkpoint: Path, identity: Identity, trainee: Trainee, optimizer: Optimizer) -> TrainState:
    """Everything is checked before anything is taken over. Raises Damaged."""
    state = _take_weights(checkpoint, identity, trainee)
    optimizer.restore(load_file(checkpoint / "state" / _OPTIMIZER))
    return state


def take_adapter(directory: Path, identity: Identity, trainee: Trainee, *, step: int) -> TrainState:
    """Take over the weights of this step's checkpoint, to be published and not gone on with. Raises Damaged."""
    found = _found(directory)
    if step not in found:
        raise Damaged("it is not here")
    return _take_weights(found[step], identity, trainee)


def _take_weights(checkpoint: Path, identity: Identity, trainee: Trainee) -> TrainState:
    manifest.read(checkpoint / "state")
    try:
        weights = adapter.open(checkpoint / "adapter", base=identity.base, max_rank=identity.spec.lora.rank)
    except AdapterRefused as error:
        raise Damaged(str(error)) from error
    facts = _facts(checkpoint)
    if facts["run"] != identity.digest:
        raise Damaged("it belongs to another run")
    trainee.load(weights)
    return TrainState.model_validate(facts["state"])


def prune(directory: Path, identity: Identity, *, newest: int) -> None:
    """Delete what this run needs no more now that it has the checkpoint `newest`. Another run's are not ours to delete."""
    found = _found(directory)
    facts = {step: _facts(path) for step, path in found.items()}
    mine = {step: told["state"]["metrics"] for step, told in facts.items() if told.get("run") == identity.digest}
    for step in mine.keys() - checkpoints.kept(mine, newest=newest):
        half_deleted = found[step].with_name(f".{found[step].name}")  # if we die over it
        found[step].rename(half_deleted)
        shutil.rmtree(half_deleted)


def _found(directory: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step-")): path for path in directory.glob("step-*")}


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What is said of the run and its state; nothing where that cannot be read."""
    try:
        facts: dict[str, Any] = json.loads((checkpoint / "state" / _STATE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return facts
