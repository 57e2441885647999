"""The last look at an adapter before it may answer: that it says something, and nothing that is no number."""

import torch

from worker.inference.lora import LoraWeights
from worker.model.adapter import AdapterRefused


@torch.inference_mode()
def require_sane(weights: LoraWeights) -> None:
    """What the adapter adds to each layer, for one and the same input. Raises AdapterRefused.

    An adapter whose B is zero throughout is the base by intent; one that adds nothing although B is not zero would answer as the
    base without anybody's intent. Finite matrices may still give infinite products.
    """
    adds_something, is_zero = False, True
    for name, (a_RI, b_RO) in weights.modules.items():
        added_O = torch.cos(torch.arange(a_RI.shape[1], dtype=a_RI.dtype)) @ a_RI.T @ b_RO  # no layer's A is blind to all of it
        if not torch.isfinite(added_O).all():
            raise AdapterRefused(f"what it adds to {name} is not finite")
        adds_something |= bool(added_O.any())
        is_zero &= not b_RO.any()
    if not adds_something and not is_zero and not weights.gains:
        raise AdapterRefused("it changes nothing, although its B matrices are not zero")
