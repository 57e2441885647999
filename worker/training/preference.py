"""Losses that compare whole answers: how each method judges a micro-batch, and what every token of it weighs in the gradient.

Axes: N labelled positions; B documents, two of each of P pairs, the preferred one first.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from app.core.spec import PreferenceSpec
from worker.training.data import MicroBatch, Totals
from worker.training.loss import Measured

CHOSEN: Final = "rewards/chosen"
REJECTED: Final = "rewards/rejected"
ACCURACY: Final = "rewards/accuracy"
MARGIN: Final = "rewards/margin"


def judge(
    spec: PreferenceSpec, batch: MicroBatch, losses_N: Tensor, is_first_N: Tensor, reference_N: Tensor
) -> tuple[Measured, Tensor]:
    """From each labelled position's loss with the adapter and without: what is measured, and the derivative of its `loss_sum` by
    each of the first. These are few numbers, so that autograd may keep account of them.
    """
    with torch.enable_grad():
        tracked_N = losses_N.detach().requires_grad_()
        policy_B, reference_B = -_of_documents(tracked_N, batch.labelled_B), -_of_documents(reference_N, batch.labelled_B)
        rewards_P2 = spec.beta * (policy_B - reference_B).view(-1, 2)
        loss_sum = dpo(rewards_P2)
        (weights_N,) = torch.autograd.grad(loss_sum, tracked_N)
    correct = _of_documents(is_first_N, batch.labelled_B)[::2].sum()
    return Measured(loss_sum.detach(), correct, _sums(rewards_P2.detach())), weights_N


def dpo(rewards_P2: Tensor) -> Tensor:
    """Direct preference optimization, equation 7 of arXiv:2305.18290."""
    return -functional.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]).sum()


def means(rewards: Tensor | None, of: Totals) -> dict[str, float]:
    """What the sums in `Measured.rewards` tell of each answer and pair; nothing where no answers were compared."""
    if rewards is None:
        return {}
    chosen, rejected, won = (rewards / of.pairs).tolist()
    return {CHOSEN: chosen, REJECTED: rejected, ACCURACY: won, MARGIN: chosen - rejected}


def _sums(rewards_P2: Tensor) -> Tensor:
    won = (rewards_P2[:, 0] > rewards_P2[:, 1]).sum()
    return torch.stack([*rewards_P2.sum(0), won])


def _of_documents(values_N: Tensor, labelled_B: Sequence[int]) -> Tensor:
    """The sum over each document's own positions. What comes after the last of them is padding."""
    parts = torch.split(values_N[: sum(labelled_B)], list(labelled_B))
    return torch.stack([part.sum() for part in parts])
