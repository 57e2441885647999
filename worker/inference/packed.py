"""bitsandbytes' packed CPU kernels: decoding two to three times faster than by dequantizing for each product."""

import copy
from collections.abc import Sequence
from typing import Any

import structlog
import torch
from torch import Tensor

from worker.model import bnb

log = structlog.get_logger()

# Root mean square of what the logits differ by, over their own spread. Packing rounds each block's scale to bfloat16. On
# SmolLM2 that is 0.03–0.04, and both paths are equally far (0.03–0.04) from the same weights computed in float32.
TOLERANCE = 0.1
_BLOCK_OUT = 32  # the kernel's tile


def enable(model: Any, probe: Sequence[int]) -> bool:
    """Let a bfloat16 model on a CPU that can compute with packed weights, if what it makes of `probe` stays within TOLERANCE.

    `probe` should be text as the model knows it: on tokens that it never saw, small differences become large ones. Packing
    changes the weights in place; they cannot be trained or saved afterwards.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if not layers or model.device.type != "cpu" or model.dtype != torch.bfloat16 or not bnb.functional.has_avx512bf16():
        return False
    plain_BTV = _logits(model, probe)
    kept = [(layer, layer.weight.data, copy.copy(layer.weight.quant_state)) for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = _fits(layer)
    difference = float((_logits(model, probe) - plain_BTV).square().mean().sqrt() / plain_BTV.std())
    if difference < TOLERANCE:  # also false for NaN
        log.info("packed_kernels_on", difference=round(difference, 4))
        return True
    log.warning("packed_kernels_off", difference=difference)
    for layer, data, state in kept:
        layer.support_avx512bf16_for_cpu = False
        layer.weight.data, layer.weight.quant_state, layer.quant_state = data, state, state
    return False


def _fits(layer: bnb.nn.Linear4bit) -> bool:
    state = layer.weight.quant_state
    return bool(layer.out_features % _BLOCK_OUT == 0 and layer.in_features % state.blocksize == 0)


@torch.inference_mode()
def _logits(model: Any, probe: Sequence[int]) -> Tensor:
    logits_BTV: Tensor = model.eval()(input_ids=torch.tensor([list(probe)]), use_cache=False).logits.float()
    return logits_BTV
