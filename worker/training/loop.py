"""The loop. Everything a step does is on this page."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from app.core.events import Event, Noted, Stepped
from app.core.spec import TrainSpec
from worker.training import preference
from worker.training.checkpoint import TrainState
from worker.training.data import TrainData
from worker.training.failures import Diverged
from worker.training.loss import Measured
from worker.training.optim import Optimizer, learning_rate
from worker.training.trainee import Trainee

MAX_SKIPPED_IN_A_ROW = 3

OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def train(
    trainee: Trainee,
    data: TrainData,
    optimizer: Optimizer,
    state: TrainState,
    spec: TrainSpec,
    *,
    keep: Callable[[TrainState], TrainState],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> TrainState:
    """Go on from `state` to the last step, to where nothing is gained any more (`TrainState.is_spent`), or to where `should_stop`
    says so; returns the state after the last whole step.

    `keep` is called where a checkpoint is due. Raises Diverged.
    """
    trainee.model.train()
    tokens_left = data.tokens_after(state.step)
    for step in data.steps_after(state.step):
        started_at = time.monotonic()
        torch.manual_seed(spec.seed + step.number)  # dropout: that of this step, whatever ran before it
        kl = trainee.kl(step.mismatched, should_stop=should_stop)
        if kl is None:
            return state
        measured, totals = Measured.nothing(optimizer.device), replace(step.totals, kl=kl)
        for batch in step.micro_batches:
            if should_stop():
                optimizer.zero_grad()
                return state
            measured += trainee.backward(batch, of=totals)  # one mean over the step, however it was cut up

        tokens_left -= step.tokens
        train_loss, accuracy = float(measured.loss_sum) / totals.weight, float(measured.correct) / totals.judged_tokens
        rewards = preference.means(spec.preference, measured.rewards, totals)
        norm = optimizer.clip()
        if not (math.isfinite(norm) and math.isfinite(train_loss)):
            optimizer.zero_grad()
            state = state.skipped(step)
            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(f"{MAX_SKIPPED_IN_A_ROW} steps in a row gave no finite gradient; try a lower learning rate")
            on_event(Noted(level="warn", message=f"Step {step.number} gave no finite gradient and was left out."))
            continue
        rate = state.rate_scale * learning_rate(step.number, data.total_steps, spec.optimizer)
        optimizer.step(rate)
        optimizer.zero_grad()

        state = state.advanced(step, {"train_loss": train_loss, "train_mean_token_accuracy": accuracy, **rewards})
        on_event(
            Stepped(
                step=step.number,
                total_steps=data.total_steps,
                train_loss=train_loss,
                train_mean_token_accuracy=accuracy,
                learning_rate=rate,
                grad_norm=norm,
                tokens=step.tokens,
                labelled_tokens=step.labelled_tokens,
                tokens_left=tokens_left,
                tokens_per_second=step.tokens / (time.monotonic() - started_at),
                rewards=rewards,
            )
        )
        if step.number % spec.checkpoint_every_steps == 0 and step.number < data.total_steps:
            state = keep(state)
            if state.is_spent(spec):
                break
    return state
