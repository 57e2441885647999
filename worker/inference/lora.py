"""An adapter's weights in the form in which they are applied. Axes: R ranks, I/O in/out features."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.model.adapter import AdapterWeights


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """One adapter as it is applied: by module, A [R, I] and B [R, O], transposed and already scaled.

    DoRA multiplies what the base and the product give by a number for each output: that of the product is in B already, `gains`
    [O] say by how much more than once the base's part counts.
    """

    rank: int
    modules: Mapping[str, tuple[Tensor, Tensor]]
    gains: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        pairs = sum(part.nbytes for pair in self.modules.values() for part in pair)
        return pairs + sum(gain_O.nbytes for gain_O in self.gains.values())

    def to(self, device: torch.device) -> "LoraWeights":
        modules = {name: (a_RI.to(device), b_RO.to(device)) for name, (a_RI, b_RO) in self.modules.items()}
        return LoraWeights(self.rank, modules, {name: gain_O.to(device) for name, gain_O in self.gains.items()})


Blend = tuple[tuple[LoraWeights, float], ...]  # adapters and how much each counts; empty for the base alone


def prepare(weights: AdapterWeights, *, dtype: torch.dtype) -> LoraWeights:
    """From A [R, I] and B [O, R] as they are stored, in this machine's memory."""
    modules, gains = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
    for name, (a_RI, b_OR) in weights.modules.items():
        scaled_OR = b_OR.float() * weights.scaling
        if dora := weights.dora.get(name):
            times_O = dora.magnitude_O / dora.norm_O
            scaled_OR *= times_O[:, None]
            gains[name] = (times_O - 1).to(dtype)
        modules[name] = (a_RI.to(dtype).contiguous(), scaled_OR.T.to(dtype).contiguous())
    return LoraWeights(weights.rank, modules, gains)
