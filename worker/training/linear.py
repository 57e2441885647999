"""Frozen 4-bit linear layers with LoRA (arXiv:2106.09685, arXiv:2305.14314), their backward written out.

Axes: T time, I/O in/out features, R rank (of all layers of a projection, side by side). y = x Wᵀ + (x · s Aᵀ) Bᵀ. W is made dense
when it is needed, forward and backward, and not kept; x is the caller's to keep, and x · s Aᵀ is small.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor, nn

Empty = Callable[..., Tensor]  # of a shape and a dtype=


class Linear:
    """One layer. `module` is a linear layer of the base, or PEFT's around one."""

    def __init__(self, module: Any) -> None:
        frozen = getattr(module, "base_layer", module)
        self._weight, self._bias = frozen.weight, frozen.bias
        adapters = (module.lora_A["default"], module.lora_B["default"]) if frozen is not module else ()
        self.width: int = module.out_features
        self.parameters: tuple[nn.Parameter, ...] = tuple(adapter.weight for adapter in adapters)
        self.rank: int = self.parameters[0].shape[0] if self.parameters else 0
        self._scaling: float = module.scaling["default"] if self.parameters else 0.0

    def frozen(self, x_TI: Tensor, *, onto_TO: Tensor | None, out_TO: Tensor) -> Tensor:
        """Without the adapter's part, added to `onto_TO` if that is given; written to `out_TO`."""
        kind = x_TI.dtype
        added = onto_TO if self._bias is None else self._bias.to(kind) if onto_TO is None else onto_TO + self._bias.to(kind)
        dense_IO = self.dense_OI(kind).T
        if added is None:
            return torch.mm(x_TI, dense_IO, out=out_TO)
        return torch.addmm(added, x_TI, dense_IO, out=out_TO)

    def dense_OI(self, kind: torch.dtype) -> Tensor:
        weight: Tensor = self._weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            return weight.to(kind)
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        packed, block, scheme = weight.data, state.blocksize, state.quant_type
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, block, scheme, state.shape, kind)
        return dense

    def a_RI(self, kind: torch.dtype) -> Tensor:
        """Scaled: s is paid here, on the smallest of all."""
        return (self.parameters[0].detach() * self._scaling).to(kind)

    def b_OR(self, kind: torch.dtype) -> Tensor:
        return self.parameters[1].detach().to(kind)

    def gradients(self, d_y_TO: Tensor, d_low_TR: Tensor, x_TI: Tensor, low_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Of A and B, in fp32 as they are."""
        return (d_low_TR.T @ x_TI).float().mul_(self._scaling), (d_y_TO.T @ low_TR).float()


class Projection:
    """Layers that read the same rows: q, k and v; gate and up; or one alone."""

    def __init__(self, *modules: Any) -> None:
        self._layers = tuple(Linear(module) for module in modules)
        self._ends = tuple(accumulate((layer.rank for layer in self._layers), initial=0))

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B of every adapted layer, in order."""
        return tuple(parameter for layer in self._layers for parameter in layer.parameters)

    def outputs(self, x_TI: Tensor, empty: Empty) -> list[Tensor]:
        return [empty((len(x_TI), layer.width), dtype=x_TI.dtype) for layer in self._layers]

    def forward(self, x_TI: Tensor, *, onto_TO: Tensor | None = None, outputs: Sequence[Tensor]) -> Tensor:
        """Fills `outputs`, one for each layer; gives x · s Aᵀ, which the backward wants."""
        kind = x_TI.dtype
        low_TR = x_TI @ self._a_RI(kind).T if self._ends[-1] else x_TI[:, :0]
        for layer, y_TO, part_TR in zip(self._layers, outputs, self._parts(low_TR), strict=True):
            layer.frozen(x_TI, onto_TO=onto_TO, out_TO=y_TO)
            if layer.rank:
                y_TO.addmm_(part_TR, layer.b_OR(kind).T)
        return low_TR

    def backward(self, d_outputs: Sequence[Tensor], low_TR: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and of x · s Aᵀ."""
        d_low_TR, kind = torch.empty_like(low_TR), low_TR.dtype
        for layer, d_y_TO, part_TR in zip(self._layers, d_outputs, self._parts(d_low_TR), strict=True):
            if layer.rank:
                torch.mm(d_y_TO, layer.b_OR(kind), out=part_TR)
        first, *others = zip(self._layers, d_outputs, strict=True)
        d_x_TI = first[1] @ first[0].dense_OI(kind)
        for layer, d_y_TO in others:
            d_x_TI.addmm_(d_y_TO, layer.dense_OI(kind))
        if self._ends[-1]:
            d_x_TI.addmm_(d_low_TR, self._a_RI(kind))
        return d_x_TI, d_low_TR

    def gradients(self, d_outputs: Sequence[Tensor], d_low_TR: Tensor, x_TI: Tensor, low_TR: Tensor) -> list[Tensor]:
        """Of `parameters`."""
        parts = zip(self._layers, d_outputs, self._parts(d_low_TR), self._parts(low_TR), strict=True)
        return [
            gradient
            for layer, d_y_TO, d_part_TR, part_TR in parts
            if layer.rank
            for gradient in layer.gradients(d_y_TO, d_part_TR, x_TI, part_TR)
        ]

    def _a_RI(self, kind: torch.dtype) -> Tensor:
        first, *others = (layer.a_RI(kind) for layer in self._layers if layer.rank)
        return torch.cat([first, *others]) if others else first

    def _parts(self, low_TR: Tensor) -> Iterator[Tensor]:
        return (low_TR[:, start:end] for start, end in pairwise(self._ends))
