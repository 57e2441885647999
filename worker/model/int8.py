"""Linear layers in 8 bits: of LLM.int8 (arXiv:2208.07339) the weights, held as bitsandbytes holds them, and not its product.

That rounds the inputs to 8 bits too, through fp16, and on a CPU in another way in train mode than in eval mode. Here only W is in
8 bits, in training and in an engine: what an adapter is trained on is what it meets.

Axes: O out features, I in features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.model import bnb

LARGEST = 127.0
_FEW = 16  # rows up to which torch's kernel for whole numbers is faster than making 16-bit ones of them: 7 times with one row


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]  # bitsandbytes has no types
    """Frozen. PEFT takes it for the layer of bitsandbytes that it is."""

    def __init__(self, like: nn.Linear, weight_OI: Tensor, absmax_O: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(like.in_features, like.out_features, bias=like.bias is not None, has_fp16_weights=False)
        self.weight = bnb.nn.Int8Params(weight_OI, requires_grad=False, SCB=absmax_O)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]  # torch gives it none
        return y if self.bias is None else y + self.bias.to(y.dtype)


def dense(weight_OI: Tensor, absmax_O: Tensor, kind: torch.dtype) -> Tensor:
    """The weights as numbers again, rounded once, to `kind`."""
    scale_O1 = (absmax_O / LARGEST)[:, None]
    if weight_OI.device.type == "cpu":
        return weight_OI.float().mul_(scale_O1).to(kind)
    made_OI = torch.empty(weight_OI.shape, dtype=kind, device=weight_OI.device)  # without the copy in 32 bits
    return torch.mul(weight_OI, scale_O1, out=made_OI)


class _Product(torch.autograd.Function):
    """x Wᵀ. Its whole numbers are exact in 16 bits; the scales are paid on the outputs, which are fewer. Nothing is kept for the
    way back: W in 16 bits would be as large as without quantization."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: bnb.nn.Int8Params) -> Tensor:
        ctx.weight, kind = weight, _kind(x)
        scaled: Tensor = _whole(x.to(kind), weight.data) * (weight.SCB / LARGEST)
        return scaled.to(kind)

    @staticmethod
    def backward(ctx: Any, *d_y: Tensor) -> tuple[Tensor, None]:
        weight, kind = ctx.weight, d_y[0].dtype
        return (d_y[0] * (weight.SCB / LARGEST)).to(kind) @ weight.data.to(kind), None


def _whole(x: Tensor, weight_OI: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if rows > _FEW or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return functional.linear(x, weight_OI.to(x.dtype))
    ones_O = x.new_ones(len(weight_OI))
    y_TO = torch._weight_int8pack_mm(x.reshape(rows, -1).contiguous(), weight_OI, ones_O)
    return y_TO.view(*x.shape[:-1], -1)


def _kind(x: Tensor) -> torch.dtype:
    """What a plain layer would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
