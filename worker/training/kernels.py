"""What a decoder layer computes between its products, forward and backward.

Axes: T time, D width, F width of the MLP, H heads, W width of a head, N labelled positions, V vocabulary; attention's own are in
attention.py. Everything is computed in fp32 and stored in the type of what came in.
"""

import torch
from torch import Tensor
from torch.nn import functional

from worker.training.fused import Fused


@Fused
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and one over each row's root mean square, [T, 1] in fp32."""
    wide_TD = x_TD.float()
    inverse_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    return (wide_TD * inverse_T1).to(x_TD.dtype) * weight_D, inverse_T1


@Fused
def rms_norm_backward(d_normed_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """The normed rows once more, which nobody kept, and the gradient of x."""
    unit_TD = x_TD.float() * inverse_T1
    d_unit_TD = d_normed_TD.float() * weight_D.float()
    d_x_TD = inverse_T1 * (d_unit_TD - unit_TD * (d_unit_TD * unit_TD).mean(-1, keepdim=True))
    return unit_TD.to(x_TD.dtype) * weight_D, d_x_TD.to(x_TD.dtype)


@Fused
def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return (functional.silu(gate_TF.float()) * up_TF.float()).to(gate_TF.dtype)


@Fused
def swiglu_backward(d_out_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output once more, which nobody kept, and the gradients of gate and up."""
    d_out, gate, up, kind = d_out_TF.float(), gate_TF.float(), up_TF.float(), gate_TF.dtype
    sigmoid = torch.sigmoid(gate)
    active = gate * sigmoid
    return (active * up).to(kind), (d_out * up * (sigmoid + active * (1 - sigmoid))).to(kind), (d_out * active).to(kind)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head as a pair, in fp32. With -sin it is its own backward."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@Fused
def rotate(x_THW: Tensor, cos_T1U: Tensor, sin_T1U: Tensor) -> Tensor:
    """`turned`, for packed rows (U = W/2)."""
    return turned(x_THW, cos_T1U, sin_T1U).to(x_THW.dtype)


@Fused
def cross_entropy(logits_NV: Tensor, targets_N: Tensor, *, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of the losses in nats, how many targets came first (or shared the first place), and the logits' gradient.

    Rows whose target is negative do not count.
    """
    wide_NV, counts_N1 = logits_NV.float(), targets_N[:, None] >= 0
    targets_N1 = targets_N.clamp(min=0)[:, None]
    highest_N1 = wide_NV.amax(dim=1, keepdim=True)
    log_total_N1 = highest_N1 + (wide_NV - highest_N1).exp().sum(dim=1, keepdim=True).log()
    target_N1 = wide_NV.gather(1, targets_N1)
    losses_N1 = torch.where(counts_N1, log_total_N1 - target_N1, 0)
    loss_sum, correct = losses_N1.sum(), (counts_N1 & (target_N1 >= highest_N1)).sum()
    if not wants_gradient:
        return loss_sum, correct, None
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N1
    d_logits_NV = torch.where(counts_N1, (wide_NV - log_total_N1).exp() - is_target_NV.float(), 0)
    return loss_sum, correct, d_logits_NV.to(logits_NV.dtype)
