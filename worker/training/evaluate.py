"""Loss and accuracy on data that is not trained on."""

from collections.abc import Callable, Iterable

import torch

from app.core.events import Evaluated
from worker.training.data import MicroBatch
from worker.training.trainee import Trainee


@torch.no_grad()
def evaluate(trainee: Trainee, batches: Iterable[MicroBatch], *, step: int, should_stop: Callable[[], bool]) -> Evaluated | None:
    """Over all labelled tokens of `batches`; None when told to stop on the way. The trainee is back in train mode after it."""
    loss_sum, correct, labelled = 0.0, 0, 0
    trainee.model.eval()
    try:
        for batch in batches:
            if should_stop():
                return None
            loss = trainee.loss(batch)
            loss_sum += float(loss.loss_sum)
            correct += int(loss.correct)
            labelled += len(batch.labelled_N)
    finally:
        trainee.model.train()
    return Evaluated(step=step, valid_loss=loss_sum / labelled, valid_mean_token_accuracy=correct / labelled)
