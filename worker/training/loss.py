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
class Measured:
    """Of one micro-batch. `loss_sum` is over its labelled tokens in nats, over its pairs, or over its rated answers; `correct`
    tokens are the model's first choice. `rewards`, where answers are compared or rated: what `preference.means` makes means of.
    """

    loss_sum: Tensor
    correct: Tensor
    rewards: Tensor | None = None

    def __add__(self, other: "Measured") -> "Measured":
        rewards = other.rewards if self.rewards is None or other.rewards is None else self.rewards + other.rewards
        return Measured(self.loss_sum + other.loss_sum, self.correct + other.correct, rewards)

    @classmethod
    def nothing(cls, device: torch.device) -> "Measured":
        """Stays on the device, so that nobody waits between micro-batches."""
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))


def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, d_hidden_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each labelled position, and whether its target came first. Each loss's gradient goes to `d_hidden_ND`."""
    rows = max(1, _LOGITS_AT_ONCE // head_VD.shape[0])
    losses_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    is_first_N = torch.zeros(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), rows):
        chunk = slice(start, start + rows)
        logits_nV = hidden_ND[chunk] @ head_VD.T
        if d_hidden_ND is None:
            losses_N[chunk], is_first_N[chunk] = cross_entropy(logits_nV, targets_N[chunk])
        else:
            losses_N[chunk], is_first_N[chunk] = cross_entropy_backward(logits_nV, targets_N[chunk])
            torch.mm(logits_nV, head_VD, out=d_hidden_ND[chunk])
    return losses_N, is_first_N
