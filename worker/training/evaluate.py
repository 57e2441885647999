"""Loss and accuracy on data that is not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from app.core.events import Evaluated
from worker.training import preference
from worker.training.data import MicroBatch, Totals
from worker.training.loss import Measured
from worker.training.trainee import Trainee


@torch.no_grad()
def evaluate(
    trainee: Trainee,
    batches: Sequence[MicroBatch],
    *,
    mismatched: Sequence[MicroBatch] = (),
    step: int,
    should_stop: Callable[[], bool],
) -> Evaluated | None:
    """Over all of `batches`; None when told to stop on the way. The trainee is back in train mode after it.

    `mismatched` are those of the same rows: see `Step`.
    """
    measured, totals = Measured.nothing(trainee.device), Totals.of(batches)
    trainee.model.eval()
    try:
        kl = trainee.kl(mismatched, should_stop=should_stop)
        if kl is None:
            return None
        totals = replace(totals, kl=kl)
        for batch in batches:
            if should_stop():
                return None
            measured += trainee.loss(batch, of=totals)
    finally:
        trainee.model.train()
    rewards = preference.means(trainee.preference, measured.rewards, totals)
    return Evaluated(
        step=step,
        valid_loss=float(measured.loss_sum) / totals.weight,
        valid_mean_token_accuracy=float(measured.correct) / totals.judged_tokens,
        rewards={f"valid_{name}": mean for name, mean in rewards.items()},
    )
