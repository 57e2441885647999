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
def rms_norm_backward(
    d_normed_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, d_residual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The normed rows once more, which nobody kept, and the gradient of x, with what comes to it from elsewhere."""
    unit_TD = x_TD.float() * inverse_T1
    d_unit_TD = d_normed_TD.float() * weight_D.float()
    d_x_TD = inverse_T1 * (d_unit_TD - unit_TD * (d_unit_TD * unit_TD).mean(-1, keepdim=True))
    if d_residual_TD is not None:
        d_x_TD = d_x_TD + d_residual_TD.float()
    return unit_TD.to(x_TD.dtype) * weight_D, d_x_TD.to(x_TD.dtype)


@Fused
def swiglu(gate_up_TO: Tensor) -> Tensor:
    """Gate and up stand side by side, O = 2F."""
    gate_TF, up_TF = gate_up_TO.float().chunk(2, dim=1)
    return (functional.silu(gate_TF) * up_TF).to(gate_up_TO.dtype)


@Fused
def swiglu_backward(d_out_TF: Tensor, gate_up_TO: Tensor, d_gate_TF: Tensor, d_up_TF: Tensor) -> Tensor:
    """Fills the gradients of gate and up; gives the output once more, which nobody kept."""
    d_out, (gate, up), kind = d_out_TF.float(), gate_up_TO.float().chunk(2, dim=1), gate_up_TO.dtype
    sigmoid = torch.sigmoid(gate)
    active = gate * sigmoid
    d_gate_TF.copy_(d_out * up * (sigmoid + active * (1 - sigmoid)))
    d_up_TF.copy_(d_out * active)
    return (active * up).to(kind)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the two halves of a head as a pair. With -sin it is its own backward."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)


@Fused
def rotate(x_THW: Tensor, cos_T1U: Tensor, sin_T1U: Tensor) -> Tensor:
    """`turned`, for packed rows (U = W/2)."""
    return turned(x_THW, cos_T1U, sin_T1U)


@Fused
def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The losses in nats, and which targets came first (or shared the first place); nothing where a target is negative."""
    losses_N, is_first_N, _ = _cross_entropy(logits_NV, targets_N)
    return losses_N, is_first_N


@Fused
def cross_entropy_backward(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and in the logits' place their gradient."""
    losses_N, is_first_N, log_total_N1 = _cross_entropy(logits_NV, targets_N)
    targets_N1 = targets_N[:, None]
    is_target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == targets_N1
    d_logits_NV = torch.where(targets_N1 >= 0, (logits_NV.float() - log_total_N1).exp() - is_target_NV.float(), 0)
    logits_NV.copy_(d_logits_NV)
    return losses_N, is_first_N


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide_NV, counts_N1 = logits_NV.float(), targets_N[:, None] >= 0
    highest_N1 = wide_NV.amax(dim=1, keepdim=True)
    log_total_N1 = highest_N1 + (wide_NV - highest_N1).exp().sum(dim=1, keepdim=True).log()
    target_N1 = wide_NV.gather(1, targets_N.clamp(min=0)[:, None])
    losses_N1 = torch.where(counts_N1, log_total_N1 - target_N1, 0)
    return losses_N1[:, 0], (counts_N1 & (target_N1 >= highest_N1))[:, 0], log_total_N1
