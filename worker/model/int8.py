"""Linear layers in 8 bits: of LLM.int8 (arXiv:2208.07339) the weights, held as bitsandbytes holds them, and not its product.

That rounds the inputs to 8 bits too, through fp16, and on a CPU in another way in train mode than in eval mode. Here W is made
dense for each product, as that of 4-bit layers is: what an adapter is trained on is what it meets in an engine.

Axes: O out features, I in features.
"""

from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127.0


class Int8Linear(Linear8bitLt):  # type: ignore[misc]  # bitsandbytes has no types
    """Frozen. PEFT takes it for the layer of bitsandbytes that it is."""

    def __init__(self, like: nn.Linear, weight_OI: Tensor, absmax_O: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(like.in_features, like.out_features, bias=like.bias is not None, has_fp16_weights=False)
        self.weight = Int8Params(weight_OI, requires_grad=False, SCB=absmax_O)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]  # torch gives it none
        return y if self.bias is None else y + self.bias.to(y.dtype)


def dense(weight_OI: Tensor, absmax_O: Tensor, kind: torch.dtype) -> Tensor:
    """The weights as numbers again, rounded once, to `kind`."""
    made_OI = torch.empty(weight_OI.shape, dtype=kind, device=weight_OI.device)
    return torch.mul(weight_OI, (absmax_O / LARGEST)[:, None], out=made_OI)


class _Product(torch.autograd.Function):
    """x Wᵀ, with W made dense once more for the way back: kept, it would be as large as without quantization."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Params) -> Tensor:
        ctx.weight, kind = weight, _kind(x)
        return functional.linear(x.to(kind), dense(weight.data, weight.SCB, kind))

    @staticmethod
    def backward(ctx: Any, *d_y: Tensor) -> tuple[Tensor, None]:
        weight, kind = ctx.weight, d_y[0].dtype
        return d_y[0] @ dense(weight.data, weight.SCB, kind), None


def _kind(x: Tensor) -> torch.dtype:
    """What a plain layer would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
