"""On a CPU, 4-bit weights as plain matrices: the same numbers, several times faster, at several times the memory."""

import structlog
import torch
from torch import Tensor, nn

from worker.model import bnb

log = structlog.get_logger()

ROWS = 64  # for how many at once oneDNN is told to lay the weights out; for other numbers it makes no measurable difference


def enable(model: nn.Module, *, dtype: torch.dtype, max_bytes: int) -> bool:
    """Replace the model's 4-bit layers, if it is on a CPU and what replaces them takes no more than `max_bytes`.

    bitsandbytes dequantizes a layer anew for each product, which on a CPU takes longer than the product. What is written
    here are the very numbers that it multiplies with. On a GPU nothing is done: there memory is short and dequantizing fast.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    size_bytes = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
    if not layers or next(iter(layers.values())).weight.device.type != "cpu" or size_bytes > max_bytes:
        return False
    for name, layer in layers.items():
        model.set_submodule(name, _plain(layer, dtype))
    log.info("weights_unpacked", size_bytes=size_bytes, dtype=str(dtype).removeprefix("torch."))
    return True


class LaidOut(nn.Linear):
    """A layer whose 16-bit weights lie as oneDNN multiplies them, which otherwise it rearranges for each product."""

    @torch.inference_mode()
    def lay_out(self) -> None:
        self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


def _plain(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> nn.Linear:
    is_for_onednn = dtype == torch.bfloat16 and bnb.functional.has_avx512bf16()
    with torch.device("meta"):
        made = (LaidOut if is_for_onednn else nn.Linear)(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight_OI = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    made.weight = nn.Parameter(weight_OI.view(layer.out_features, layer.in_features), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    if isinstance(made, LaidOut):
        made.lay_out()
    return made
