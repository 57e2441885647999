"""Losses of whole answers, compared or rated: how each method judges a micro-batch, and what every token weighs in the gradient.

Axes: N labelled positions; B documents, two of each of P pairs, the preferred one first, or each a rated answer.
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
COPYING: Final = "nll_loss"
LOG_ODDS: Final = "log_odds_chosen"
KL: Final = "kl"

_CERTAIN: Final = -1e-6  # the largest mean log-probability whose odds are told from others in 32 bits


def judge(
    spec: PreferenceSpec, batch: MicroBatch, of: Totals, losses_N: Tensor, is_first_N: Tensor, reference_N: Tensor | None
) -> tuple[Measured, Tensor]:
    """From each labelled position's loss with the adapter and, where the method has a reference, without: what is measured, and
    the derivative of its `loss_sum` by each of the first. These are few numbers, so that autograd may keep account of them.
    """
    with torch.enable_grad():
        tracked_N = losses_N.detach().requires_grad_()
        if reference_N is None:
            loss_sum, sums = orpo(spec, batch, of, tracked_N)
        else:
            gained_B = _of_documents(reference_N - tracked_N, batch.labelled_B)
            loss_sum, sums = kto(spec, batch, of, gained_B) if batch.ratings else dpo(spec, gained_B)
        (weights_N,) = torch.autograd.grad(loss_sum, tracked_N)
    correct = _of_documents(is_first_N, batch.labelled_B)[:: 2 if batch.pairs else 1].sum()
    return Measured(loss_sum.detach(), correct, sums.detach()), weights_N


def means(spec: PreferenceSpec | None, sums: Tensor | None, of: Totals) -> dict[str, float]:
    """What the sums in `Measured.rewards` tell of all; nothing where answers are only learnt."""
    if spec is None or sums is None:
        return {}
    if spec.method == "kto":
        return _means_of_rated(sums.tolist(), of)
    chosen, rejected, won, *others = (sums / of.pairs).tolist()
    told = {CHOSEN: chosen, REJECTED: rejected, ACCURACY: won, MARGIN: chosen - rejected}
    return told | dict(zip((COPYING, LOG_ODDS), others, strict=True)) if spec.method == "orpo" else told


def _means_of_rated(sums: Sequence[float], of: Totals) -> dict[str, float]:
    """A step may hold answers of one rating only."""
    chosen, rejected, right = sums
    told = {ACCURACY: right / of.weight, KL: of.kl}
    if of.good:
        told[CHOSEN] = chosen / of.good
    if bad := of.weight - of.good:
        told[REJECTED] = rejected / bad
    return told | ({MARGIN: told[CHOSEN] - told[REJECTED]} if CHOSEN in told and REJECTED in told else {})


def dpo(spec: PreferenceSpec, gained_B: Tensor) -> tuple[Tensor, Tensor]:
    """Direct preference optimization, equation 7 of arXiv:2305.18290."""
    rewards_P2 = spec.beta * gained_B.view(-1, 2)
    return -functional.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]).sum(), _sums(rewards_P2)


def orpo(spec: PreferenceSpec, batch: MicroBatch, of: Totals, losses_N: Tensor) -> tuple[Tensor, Tensor]:
    """Odds ratio preference optimization, equations 6 and 7 of arXiv:2403.07691; docs/decisions/0019 says what is copied.

    That is a mean over all tokens `of` a step: this part of their sum is scaled so that the number of pairs divides it too.
    """
    copied = of.pairs * _of_documents(losses_N, batch.labelled_B)[::2].sum() / of.judged_tokens
    is_answer_N = torch.from_numpy(batch.is_answer_N).to(losses_N.device)
    answers_N = losses_N[: len(is_answer_N)] * is_answer_N
    mean_B = -_of_documents(answers_N, batch.labelled_B) / _of_documents(is_answer_N, batch.labelled_B)
    log_odds_B = mean_B - torch.log(-torch.expm1(mean_B.clamp(max=_CERTAIN)))
    log_odds_P = log_odds_B[::2] - log_odds_B[1::2]
    loss_sum = copied - spec.beta * functional.logsigmoid(log_odds_P).sum()
    return loss_sum, torch.cat([_sums(spec.beta * mean_B.view(-1, 2)), torch.stack([copied, log_odds_P.sum()])])


def kto(spec: PreferenceSpec, batch: MicroBatch, of: Totals, gained_B: Tensor) -> tuple[Tensor, Tensor]:
    """Kahneman-Tversky optimization, equations 7 and 8 of arXiv:2402.01306: 1 - σ, and weights, as in TRL."""
    is_good_B = torch.tensor(batch.ratings, device=gained_B.device)
    beyond_B = torch.where(is_good_B, 1.0, -1.0) * spec.beta * (gained_B - of.kl)
    weights_B = torch.where(is_good_B, spec.desirable_weight, spec.undesirable_weight)
    rewards_B = spec.beta * gained_B
    sums = [rewards_B[is_good_B].sum(), rewards_B[~is_good_B].sum(), (beyond_B > 0).sum()]
    return (weights_B * torch.sigmoid(-beyond_B)).sum(), torch.stack(sums)


def _sums(rewards_P2: Tensor) -> Tensor:
    won = (rewards_P2[:, 0] > rewards_P2[:, 1]).sum()
    return torch.stack([*rewards_P2.sum(0), won])


def _of_documents(values_N: Tensor, labelled_B: Sequence[int]) -> Tensor:
    """The sum over each document's own positions. What comes after the last of them is padding."""
    parts = torch.split(values_N[: sum(labelled_B)], list(labelled_B))
    return torch.stack([part.sum() for part in parts])
