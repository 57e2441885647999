"""Several adapters in one forward. Axes: T rows of the step, I/O in/out features, A adapters on the shelf, R ranks of all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from worker.inference import lora_on_cpu
from worker.inference.lora import Blend, LoraWeights
from worker.inference.shelf import Shelf


class Products(Protocol):
    """How the rows of one step get what their adapters add."""

    def add(self, rows_TI: Tensor, output_TO: Tensor, a_RI: Tensor, b_RO: Tensor) -> None: ...


class LoraLayers:
    """Adds each row's own adapters to the linear layers of one model, by forward hooks. Rows of the base are not touched.

    A row's blend adds to the base's output what each adapter by itself would change in it, times its weight.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, dtype: torch.dtype) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":  # its rows are the sampled ones, not those of the step
                module.register_forward_hook(self._hook(name))
        self._shelf = Shelf(dtype, device)
        self._held: list[LoraWeights] = []
        self._gains: dict[str, Tensor] = {}  # by module, those of all on the shelf [A, O], zeros where one has none
        self._shares_TA = torch.empty(0)  # how much each on the shelf counts for each row, where there are gains
        self._products: Products | None = None  # None where no row has an adapter

    def use(self, segments: Sequence[tuple[Blend, int]]) -> None:
        """What the next forward's rows are to be: (adapters, number of rows), in order."""
        active = dict.fromkeys(weights for blend, _ in segments for weights, _ in blend)
        self._products = None
        if not active:
            return
        shelf = self._shelf
        shelf.hold(active)
        if list(shelf.starts) != self._held:
            self._held = list(shelf.starts)
            self._gains = _gains(self._held)
        places = {weights: place for place, weights in enumerate(self._held)}
        shares_TA, start = torch.zeros((sum(count for _, count in segments), len(places))), 0
        for blend, count in segments:
            for weights, share in blend:
                shares_TA[start : start + count, places[weights]] = share
            start += count
        if self._gains:
            self._shares_TA = shares_TA.to(shelf.device, shelf.dtype)
        self._products = (Grouped if shelf.device.type == "cpu" else Masked)(shares_TA, shelf)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output_1TO: Tensor) -> Tensor | None:
            if self._products is None or (pair := self._shelf.matrices(name)) is None:
                return None
            more_TO = self._more(name, module, output_1TO[0])
            self._products.add(inputs[0][0], output_1TO[0], *pair)
            return output_1TO if more_TO is None else output_1TO.add_(more_TO)

        return add

    def _more(self, name: str, module: nn.Module, output_TO: Tensor) -> Tensor | None:
        """What the gains add. A bias is no part of what they multiply."""
        if name not in self._gains:
            return None
        products_TO = output_TO - module.bias if isinstance(module.bias, Tensor) else output_TO
        return products_TO * (self._shares_TA @ self._gains[name])


class Masked:
    """On any device: every row meets every adapter, and all but its own ranks are set to zero: two products a layer, as in
    S-LoRA and Punica, without their kernels."""

    def __init__(self, shares_TA: Tensor, shelf: Shelf) -> None:
        mine_T = shares_TA.any(dim=1)
        self._rows_T = None if bool(mine_T.all()) else mine_T.nonzero()[:, 0].to(shelf.device)  # None when all have an adapter
        owners_R = torch.full((shelf.end,), len(shelf.starts))  # the last place is nobody's
        for place, (weights, start) in enumerate(shelf.starts.items()):
            owners_R[start : start + weights.rank] = place
        weights_TR = nn.functional.pad(shares_TA[mine_T], (0, 1))[:, owners_R]
        others_TR = weights_TR == 0
        self._others_TR = others_TR.to(shelf.device) if bool(others_TR.any()) else None  # ranks that are not the row's own
        is_weighted = bool(((shares_TA != 0) & (shares_TA != 1)).any())
        self._weights_TR = weights_TR.to(shelf.device, shelf.dtype) if is_weighted else None

    def add(self, rows_TI: Tensor, output_TO: Tensor, a_RI: Tensor, b_RO: Tensor) -> None:
        if self._rows_T is not None:
            rows_TI = rows_TI[self._rows_T]
        inner_TR = rows_TI.to(a_RI.dtype) @ a_RI.T
        if self._others_TR is not None:
            inner_TR.masked_fill_(self._others_TR, 0)  # not a product with zero: a neighbour's overflow must not become NaN here
        if self._weights_TR is not None:
            inner_TR *= self._weights_TR
        delta_TO = (inner_TR @ b_RO).to(output_TO.dtype)
        if self._rows_T is None:
            output_TO.add_(delta_TO)
        else:
            output_TO.index_add_(0, self._rows_T, delta_TO)


class Grouped:
    """On a CPU: each adapter meets its own rows."""

    def __init__(self, shares_TA: Tensor, shelf: Shelf) -> None:
        groups, rows, shares = list[tuple[int, int, int, int]](), list[int](), list[float]()
        for (weights, start), shares_T in zip(shelf.starts.items(), shares_TA.T, strict=True):
            mine = shares_T.nonzero()[:, 0].tolist()
            groups.append((len(rows), len(rows) + len(mine), start, weights.rank))
            rows += mine
            shares += shares_T[mine].tolist()
        self._groups = np.array(groups, np.int64), np.array(rows, np.int64), np.array(shares, np.float32)

    def add(self, rows_TI: Tensor, output_TO: Tensor, a_RI: Tensor, b_RO: Tensor) -> None:
        x_TI, out_TO = (_numbers(part) for part in (rows_TI.contiguous(), output_TO))
        lora_on_cpu.add(x_TI, out_TO, a_RI.numpy(), b_RO.numpy(), *self._groups)


def _numbers(rows: Tensor) -> NDArray[Any]:
    """The tensor itself, as numpy has it: bfloat16 as the 16 bits that it is."""
    array: NDArray[Any] = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return array


def _gains(held: Iterable[LoraWeights]) -> dict[str, Tensor]:
    like = {name: gain_O for weights in held for name, gain_O in weights.gains.items()}
    return {name: torch.stack([_gain(weights.gains, name, like_O) for weights in held]) for name, like_O in like.items()}


def _gain(gains: Mapping[str, Tensor], name: str, like_O: Tensor) -> Tensor:
    return gains[name] if name in gains else torch.zeros_like(like_O)
