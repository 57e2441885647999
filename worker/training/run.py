"""One training run: values in, events out. It knows no service and could run on a plane."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from app.core import catalog, manifest
from app.core.events import Checkpointed, Finished, MeasuredMemory, Noted, Started, Stopped
from app.core.manifest import Damaged
from app.core.spec import TrainSpec
from app.core.tokens.tokenise import TokenisedSet
from worker.model import adapter
from worker.model import base as bases
from worker.model.adapter import AdapterRefused, AdapterWeights
from worker.model.base import LoadedBase
from worker.training import checkpoint, loop
from worker.training.checkpoint import Identity, TrainState
from worker.training.data import Step, TrainData, micro_batches, mismatched
from worker.training.evaluate import evaluate
from worker.training.examine import Examination, ToldToStop
from worker.training.failures import Diverged, NothingToTrain, StartRefused, WrongRows
from worker.training.loop import OnEvent, ShouldStop
from worker.training.optim import Optimizer
from worker.training.trainee import Trainee, adapted

_ROLLED_BACK = 0.5  # of the learning rate


@dataclass(frozen=True)
class Paths:
    """Tokenised sets to read, an adapter directory and checkpoints to write, prepared bases to keep.

    `start` is the directory of the adapter that the spec continues. `table` is written beside the adapter: see `Examination.of`.
    """

    dataset: Path
    output: Path
    checkpoints: Path
    cache: Path
    validation: Path | None = None
    start: Path | None = None

    @property
    def table(self) -> Path:
        return self.output.with_name("examples.csv")


def run(
    spec: TrainSpec,
    paths: Paths,
    base: catalog.Base,
    *,
    base_model: LoadedBase | None = None,
    micro_batch_tokens: int | None = None,
    is_checkpointing: bool = False,
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> Finished | Stopped:
    """Train an adapter, going on from the newest checkpoint if there is one. The result is also the last event.

    A run that diverges is rolled back to there once, and goes on at half the rate. `base_model` is the base if it is in memory
    already, quantized as the spec says. `micro_batch_tokens` goes before the spec's: how a step is cut up changes nothing but
    memory and the last bits. `is_checkpointing` changes memory and time: see `adapted`. Raises TrainingFailed, BaseRefused.
    """
    examples = TokenisedSet.read(paths.dataset)
    if not examples.examples:
        raise NothingToTrain("no row of the training file can be trained on")
    _require_rows_of(spec, examples)
    loaded = base_model or bases.load(base, paths.cache, quantization=spec.quantization, for_training=True)
    tokens_at_once = micro_batch_tokens or spec.micro_batch_tokens
    held_out = _open_validation(paths.validation, spec)
    attempt = partial(
        _attempt,
        Identity(spec, loaded, examples.sha256),
        paths,
        TrainData(examples, spec, micro_batch_tokens=tokens_at_once),
        _as_step(held_out, spec, tokens_at_once),
        Examination(examples, held_out, spec, max_tokens=tokens_at_once),
        on_event,
        should_stop,
        is_checkpointing=is_checkpointing,
    )
    result, reason = None, ""
    try:
        result = attempt(rate_scale=1.0)
    except Diverged as error:
        reason = str(error)  # the error itself would hold all that its attempt had in memory
    if result is None:
        on_event(Noted(level="warn", message=f"Rolled back to the last checkpoint, to go on at half the rate: {reason}."))
        result = attempt(rate_scale=_ROLLED_BACK)
    on_event(result)
    return result


def _attempt(
    identity: Identity,
    paths: Paths,
    data: TrainData,
    validation: Step,
    examination: Examination,
    on_event: OnEvent,
    should_stop: ShouldStop,
    *,
    is_checkpointing: bool,
    rate_scale: float,
) -> Finished | Stopped:
    """From the newest checkpoint, or from the start, to the end, or to where it is told to stop. Raises Diverged."""
    spec = identity.spec
    with adapted(identity.base, spec, is_checkpointing=is_checkpointing) as fresh:
        trainee = fresh.started_from(_open_start(identity, paths.start)) if spec.continue_from else fresh
        optimizer = Optimizer(trainee.parameters, spec.optimizer, faster=trainee.fast_parameters)
        measure = partial(_measured, optimizer.device, data.micro_batch_tokens, is_checkpointing)
        keeper = _Keeper(identity, paths, trainee, optimizer, validation, examination, measure, on_event, should_stop)
        state = keeper.restore().slowed(rate_scale)
        on_event(
            Started(
                total_steps=data.total_steps,
                resumed_from=state.step,
                trainable_parameters=optimizer.parameters,
                checkpoint_every_steps=spec.checkpoint_every_steps,
                evaluation_tokens=validation.tokens,
                examination_tokens=examination.tokens,
            )
        )
        if spec.judges and keeper.lacks_evaluation(state):
            state = keeper.keep(state)
        if not state.is_spent(spec):
            state = loop.train(
                trainee, data, optimizer, state, spec, keep=keeper.keep, on_event=on_event, should_stop=should_stop
            )
        if state.is_spent(spec) and state.step < data.total_steps:
            on_event(Noted(level="info", message=_stopped_early(state, spec, data.total_steps)))
            return keeper.finish(state)
        return keeper.finish(state) if state.step == data.total_steps else keeper.stop(state)


class _Keeper:
    """What becomes of a run's state: evaluated, kept, published."""

    def __init__(
        self,
        identity: Identity,
        paths: Paths,
        trainee: Trainee,
        optimizer: Optimizer,
        validation: Step,
        examination: Examination,
        measure: Callable[[], MeasuredMemory],
        on_event: OnEvent,
        should_stop: ShouldStop,
    ) -> None:
        self._identity, self._paths, self._trainee, self._optimizer = identity, paths, trainee, optimizer
        self._measure, self._on_event, self._should_stop = measure, on_event, should_stop
        self._validation, self._examination = validation, examination
        self._kept_step = 0

    def restore(self) -> TrainState:
        """The newest usable checkpoint's state, or a fresh one."""

        def note(step: int, reason: str) -> None:
            self._on_event(Noted(level="warn", message=f"The checkpoint of step {step} is not used: {reason}."))

        paths, identity = self._paths, self._identity
        state = checkpoint.restore(paths.checkpoints, identity, self._trainee, self._optimizer, on_damaged=note)
        self._kept_step = state.step if state else 0
        return state or TrainState()

    def lacks_evaluation(self, state: TrainState) -> bool:
        """Whether whoever wrote this checkpoint was stopped while it was evaluated, and so came to no decision."""
        is_due = state.step > 0 and state.step % self._identity.spec.checkpoint_every_steps == 0
        return is_due and state.judged_step != state.step

    def keep(self, state: TrainState) -> TrainState:
        return self._checkpointed(self._evaluated(state) or state)

    def stop(self, state: TrainState) -> Stopped:
        if state.step != self._kept_step:
            self._checkpointed(state)
        return Stopped(step=state.step)

    def finish(self, state: TrainState) -> Finished | Stopped:
        evaluated = state if state.judged_step == state.step else self._evaluated(state)
        if evaluated is None:
            return self.stop(state)
        chosen = self._chosen(evaluated)
        self._identity.write_adapter(self._paths.output, self._trainee, chosen, kind="adapter")
        try:
            self._on_event(self._examination.of(self._trainee, table=self._paths.table, should_stop=self._should_stop))
        except ToldToStop:  # an older adapter that was best must not be kept as if it were the last step's
            return self.stop(evaluated) if chosen is evaluated else Stopped(step=self._kept_step)
        return Finished(
            step=evaluated.step,
            trained_tokens=evaluated.trained_tokens,
            directory=str(self._paths.output),
            table=str(self._paths.table),
            memory=self._measure(),
        )

    def _chosen(self, last: TrainState) -> TrainState:
        """What is published: the last state, or with the weights of the best one that state. The trainee has its weights."""
        if self._identity.spec.publish == "last" or last.best_step in (0, last.step):
            return last
        best, loss = last.best_step, last.best_loss
        try:
            chosen = checkpoint.take_adapter(self._paths.checkpoints, self._identity, self._trainee, step=best)
        except Damaged as error:
            message = f"Step {best} had the lowest validation loss, but its checkpoint is not used: {error}. The last step's is."
            self._on_event(Noted(level="warn", message=message))
            return last
        self._on_event(
            Noted(level="info", message=f"The adapter is that of step {best}: its validation loss, {loss:.4f}, was best.")
        )
        return chosen

    def _evaluated(self, state: TrainState) -> TrainState | None:
        """With the metrics of the validation file, if there is one; None when told to stop on the way."""
        batches, mismatched = self._validation.micro_batches, self._validation.mismatched
        if not batches:
            return state
        event = evaluate(self._trainee, batches, mismatched=mismatched, step=state.step, should_stop=self._should_stop)
        if event is None:
            return None
        self._on_event(event)
        early = self._identity.spec.early_stopping
        return state.judged(
            valid_loss=event.valid_loss,
            valid_mean_token_accuracy=event.valid_mean_token_accuracy,
            min_delta=early.min_delta if early else 0.0,
        )

    def _checkpointed(self, state: TrainState) -> TrainState:
        directory = checkpoint.write(self._paths.checkpoints, self._identity, self._trainee, self._optimizer, state)
        self._kept_step = state.step
        self._on_event(Checkpointed(step=state.step, directory=str(directory), metrics=state.metrics))
        checkpoint.prune(self._paths.checkpoints, self._identity, newest=state.step)
        return state


def _stopped_early(state: TrainState, spec: TrainSpec, total_steps: int) -> str:
    assert spec.early_stopping is not None
    by = f" by more than {spec.early_stopping.min_delta:g}" if spec.early_stopping.min_delta else ""
    stale = f"the validation loss has not fallen{by} in {state.stale} evaluations"
    return f"Stopped early at step {state.step} of {total_steps}: {stale}."


def _require_rows_of(spec: TrainSpec, examples: TokenisedSet) -> None:
    """Answers that are compared or rated must never be taken for answers to learn. Raises WrongRows."""
    held = "pairs of answers" if examples.pairs else "rated answers" if examples.rated else "answers to learn"
    method = spec.preference.method if spec.preference else "supervised"
    wanted = {"supervised": "answers to learn", "dpo": "pairs of answers", "orpo": "pairs of answers", "kto": "rated answers"}
    if examples.examples and held != wanted[method]:
        raise WrongRows(f"the file holds {held}, and the method {method} trains on {wanted[method]}")


def _open_start(identity: Identity, directory: Path | None) -> AdapterWeights:
    """Exactly the adapter that the spec names, and only as the spec has it. Raises StartRefused."""
    start, lora = identity.spec.continue_from, identity.spec.lora
    assert start is not None
    try:
        if directory is None:
            raise AdapterRefused("it has been deleted")
        if manifest.read(directory).digest != start.digest:
            raise AdapterRefused("its files are not those that were there when the job was created")
        weights = adapter.open(directory, base=identity.base, max_rank=lora.rank)
        if not weights.is_shaped_as(lora):
            raise AdapterRefused("it has another shape than the job's adapter")
    except (AdapterRefused, Damaged) as error:
        raise StartRefused(f"the model {start.model} cannot be continued: {error}") from error
    return weights


def _open_validation(path: Path | None, spec: TrainSpec) -> TokenisedSet | None:
    if path is None:
        return None
    examples = TokenisedSet.read(path)
    _require_rows_of(spec, examples)
    return examples


def _as_step(validation: TokenisedSet | None, spec: TrainSpec, tokens_at_once: int) -> Step:
    """All of it as one step that is never made."""
    if validation is None:
        return Step(0, ())
    every_E, last = range(validation.examples), validation.examples - 1
    return Step(
        0,
        micro_batches(validation, every_E, max_tokens=tokens_at_once, preference=spec.preference),
        mismatched(validation, every_E, last, max_tokens=tokens_at_once),
    )


def _measured(device: torch.device, micro_batch_tokens: int, is_checkpointing: bool) -> MeasuredMemory:
    is_cuda = device.type == "cuda"
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return MeasuredMemory(
        peak_bytes=torch.cuda.max_memory_allocated(device) if is_cuda else rss_bytes,
        measured_as="cuda" if is_cuda else "rss",
        micro_batch_tokens=micro_batch_tokens,
        is_checkpointing=is_checkpointing,
    )
