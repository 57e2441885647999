"""Cross-entropy that never holds the logits of more than a few rows.

Axes: N labelled positions, D width, V vocabulary. The head is frozen, so its only gradient is the hidden states'; that is
computed with the loss, chunk by chunk, as in Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.training.kernels import cross_entropy

NO_TARGET = -1  # of a row that does not count
_LOGITS_AT_ONCE = 2**25  # 64 MiB in 16 bits, and as much again for their gradient


@dataclass(frozen=True)
class LabelledLoss:
    """`loss_sum` is in nats over the labelled tokens, with its gradient; `correct` of them are the model's first choice."""

    loss_sum: Tensor
    correct: Tensor


def labelled_loss(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> LabelledLoss:
    """Cross-entropy of labelled positions. A sum, not a mean: see loop.train."""
    loss_sum, correct = _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N)  # type: ignore[no-untyped-call]  # as torch has it
    return LabelledLoss(loss_sum, correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, _LOGITS_AT_ONCE // head_VD.shape[0])
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        wants_gradient, gradients = ctx.needs_input_grad[0], []
        for hidden_nD, targets_n in zip(torch.split(hidden_ND, rows), torch.split(targets_N, rows), strict=True):
            losses, hits, d_logits_nV = cross_entropy(hidden_nD @ head_VD.T, targets_n, wants_gradient=wants_gradient)
            loss_sum, correct = loss_sum + losses, correct + hits
            if d_logits_nV is not None:
                gradients.append(d_logits_nV @ head_VD)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0], None, None
