"""Frozen linear layers, quantized or not, with LoRA (arXiv:2106.09685, arXiv:2305.14314), forward and backward written out.

Layers that read the same rows are one here: their weights stand on top of each other, their adapters side by side.
y = x Wᵀ + (x · s Aᵀ) Bᵀ. W is made dense when it is needed, forward and backward, and not kept.

Axes: T time, I in features, O out features of all layers, R rank of all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from worker.model import bnb, int8

Empty = Callable[..., Tensor]  # of a shape and a dtype=
Learn = Callable[[Tensor], None]  # of the rows that a projection read


class Projection:
    """q, k and v; gate and up; or one layer alone. `modules` are linear layers of the base, or PEFT's around them."""

    def __init__(self, *modules: Any) -> None:
        frozen = [getattr(module, "base_layer", module) for module in modules]
        self.widths = [module.out_features for module in modules]
        self._weights = _stacked([layer.weight for layer in frozen])
        self._bias_O = _joined_bias(frozen)
        self._adapters = _side_by_side(modules)
        self._rank = sum(adapter.a.shape[0] for adapter in self._adapters)
        self._modules = modules

    def forward(self, x_TI: Tensor, *, onto_TO: Tensor | None = None, empty: Empty) -> tuple[Tensor, "Applied"]:
        """The outputs side by side, added to `onto_TO`, in memory from `empty`; and the way back."""
        kind = x_TI.dtype
        y_TO = empty((len(x_TI), sum(self.widths)), dtype=kind)
        added, dense_IO = self._added(onto_TO, kind), self.dense_OI(kind).T
        if added is None:
            torch.mm(x_TI, dense_IO, out=y_TO)
        else:
            torch.addmm(added, x_TI, dense_IO, out=y_TO)
        a_RI, b_OR = self._cast(x_TI)
        low_TR = x_TI @ a_RI.T
        if self._rank and not self._is_bare:
            y_TO.addmm_(low_TR, b_OR.T)
        return y_TO, Applied(self, a_RI, b_OR, low_TR)

    @property
    def _is_bare(self) -> bool:
        """Whether PEFT has been told to leave the adapters out. Then there is no way back."""
        return any(getattr(module, "disable_adapters", False) for module in self._modules)

    def dense_OI(self, kind: torch.dtype) -> Tensor:
        first, *others = (weights.dense_OI(kind) for weights in self._weights)
        return torch.cat([first, *others]) if others else first

    def add_gradients(self, d_a_RI: Tensor, d_b_RO: Tensor) -> None:
        """To the adapters' own, in fp32 as they are."""
        for adapter in self._adapters:
            _gradient(adapter.a).add_(d_a_RI[adapter.ranks], alpha=adapter.scaling)
            _gradient(adapter.b).add_(d_b_RO[adapter.ranks, adapter.rows].T)

    def _added(self, onto_TO: Tensor | None, kind: torch.dtype) -> Tensor | None:
        if self._bias_O is None:
            return onto_TO
        return self._bias_O.to(kind) if onto_TO is None else onto_TO + self._bias_O.to(kind)

    def _cast(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """All A, scaled: s is paid here, on the smallest of all; and all B, each in its own rows and columns."""
        a_RI, b_OR = x_TI.new_empty((self._rank, x_TI.shape[1])), x_TI.new_zeros((sum(self.widths), self._rank))
        for adapter in self._adapters:
            torch.mul(adapter.a, adapter.scaling, out=a_RI[adapter.ranks])
            b_OR[adapter.rows, adapter.ranks] = adapter.b
        return a_RI, b_OR


@dataclass(frozen=True)
class Applied:
    """One use of a projection, and its way back. The rows it read are the caller's to keep, or to make again."""

    projection: Projection
    a_RI: Tensor
    b_OR: Tensor
    low_TR: Tensor

    def backward(self, d_y_TO: Tensor) -> tuple[Tensor, Learn]:
        """The gradient of the rows, and what adds the adapters' own once it is given those rows."""
        d_x_TI = d_y_TO @ self.projection.dense_OI(d_y_TO.dtype)
        d_low_TR = d_y_TO @ self.b_OR
        if d_low_TR.shape[1]:
            d_x_TI.addmm_(d_low_TR, self.a_RI)

        def learn(x_TI: Tensor) -> None:
            d_low_RT, low_RT = d_low_TR.T.contiguous(), self.low_TR.T.contiguous()  # as a CPU multiplies thin ones fastest
            self.projection.add_gradients(d_low_RT @ x_TI, low_RT @ d_y_TO)

        return d_x_TI, learn


@dataclass(frozen=True)
class _Adapter:
    """A and B of one layer, and where they stand among those of its projection."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    rows: slice
    ranks: slice


class _Weights:
    """Weights of one kind on top of each other, as one. Each layer's own becomes a view of them."""

    def __init__(self, weights: Sequence[Any]) -> None:
        self._states = [_state(weight) for weight in weights]
        shapes = [_shape(weight) for weight in weights]
        self._shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        self._data = torch.cat([weight.data.flatten() for weight in weights])
        self._absmax_O = torch.cat([weight.SCB for weight in weights]) if _is_int8(weights[0]) else None
        parts = torch.split(self._data, [weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view(weight.shape)

    def dense_OI(self, kind: torch.dtype) -> Tensor:
        first, *_ = self._states
        if self._absmax_O is not None:
            return int8.dense(self._data.view(self._shape), self._absmax_O, kind)
        if first is None:
            return self._data.view(self._shape).to(kind)
        scales = [_scales(state) for state in self._states]
        all_scales = torch.cat(scales) if len(scales) > 1 else scales[0]
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self._data, all_scales, first.blocksize, first.quant_type, self._shape, kind
        )
        return dense


def _stacked(weights: Sequence[Any]) -> list[_Weights]:
    """As one where they can be: of one kind, and no block of 4-bit numbers across two of them."""
    if len({_kind(weight) for weight in weights}) == 1 and all(_is_whole(weight) for weight in weights):
        return [_Weights(weights)]
    return [_Weights([weight]) for weight in weights]


def _kind(weight: Any) -> tuple[object, ...]:
    state = _state(weight)
    return (weight.dtype,) if state is None else (weight.dtype, state.blocksize, state.quant_type)


def _is_whole(weight: Any) -> bool:
    state = _state(weight)
    return state is None or state.shape.numel() % state.blocksize == 0


def _shape(weight: Any) -> tuple[int, int]:
    state = _state(weight)
    rows, columns = weight.shape if state is None else state.shape
    return rows, columns


def _state(weight: Any) -> Any:
    """bitsandbytes' account of a 4-bit weight; None for any other."""
    return getattr(weight, "quant_state", None)


def _is_int8(weight: Any) -> bool:
    return getattr(weight, "SCB", None) is not None


def _scales(state: Any) -> Tensor:
    scales: Tensor = state.absmax
    return bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset if state.nested else scales


def _joined_bias(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def _side_by_side(modules: Sequence[Any]) -> list[_Adapter]:
    """Of the layers that have one."""
    spans = pairwise(accumulate((module.out_features for module in modules), initial=0))
    adapters, rank = list[_Adapter](), 0
    for module, (start, end) in zip(modules, spans, strict=True):
        if not hasattr(module, "lora_A"):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        ranks = slice(rank, rank := rank + len(a))
        adapters.append(_Adapter(a, b, module.scaling["default"], slice(start, end), ranks))
    return adapters


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
