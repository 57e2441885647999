"""Cross-entropy that never holds the logits of more than a few rows.

Axes: N labelled positions, D width, V vocabulary. The head is frozen, so its only gradient is the hidden states'; that is
computed with the loss, chunk by chunk, as in Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.training.kernels import cross_entropy, cross_entropy_backward

NO_TARGET = -1  # of a row that does not count
_LOGITS_AT_ONCE = 2**25  # 64 MiB in 16 bits


@dataclass(frozen=True)
class LabelledLoss:
    """`loss_sum` is in nats over the labelled tokens; `correct` of them are the model's first choice."""

    loss_sum: Tensor
    correct: Tensor


def labelled_loss(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, d_hidden_ND: Tensor | None = None) -> LabelledLoss:
    """Cross-entropy of labelled positions. A sum, not a mean: see loop.train. Its gradient is written to `d_hidden_ND`."""
    rows = max(1, _LOGITS_AT_ONCE // head_VD.shape[0])
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), rows):
        chunk = slice(start, start + rows)
        logits_nV = hidden_ND[chunk] @ head_VD.T
        if d_hidden_ND is None:
            losses, hits = cross_entropy(logits_nV, targets_N[chunk])
        else:
            losses, hits = cross_entropy_backward(logits_nV, targets_N[chunk])
            torch.mm(logits_nV, head_VD, out=d_hidden_ND[chunk])
        loss_sum, correct = loss_sum + losses, correct + hits
    return LabelledLoss(loss_sum, correct)
