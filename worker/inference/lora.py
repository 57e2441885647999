"""Several adapters in one forward. Axes: T rows of the step, I/O in/out features, R ranks of all active adapters."""

from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.model.adapter import AdapterWeights


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """One adapter as it is applied: by module, A [R, I] and B [R, O], transposed and already scaled."""

    rank: int
    modules: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for pair in self.modules.values() for part in pair)


def prepare(weights: AdapterWeights, *, dtype: torch.dtype, device: torch.device) -> LoraWeights:
    """From A [R, I] and B [O, R] as they are stored."""
    made = {
        name: (a_RI.to(device, dtype).contiguous(), (b_OR.float() * weights.scaling).T.to(device, dtype).contiguous())
        for name, (a_RI, b_OR) in weights.modules.items()
    }
    return LoraWeights(weights.rank, made)


class LoraLayers:
    """Adds each row's own adapter to the linear layers of one model, by forward hooks. Rows of the base are not touched.

    The active adapters' matrices lie side by side, so that a layer costs two products however many there are (as in S-LoRA and
    Punica, without their kernels): every row meets every adapter, and all but its own ranks are then set to zero.
    """

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":  # its rows are the sampled ones, not those of the step
                module.register_forward_hook(self._hook(name))
        self._built: dict[LoraWeights, slice] = {}  # where each adapter's ranks lie
        self._wide: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows_T: Tensor | None = None  # rows with an adapter; None when all have one
        self._others_TR: Tensor | None = None  # ranks that are not the row's own; None when there are no others
        self._is_on = False

    def use(self, segments: Sequence[tuple[LoraWeights | None, int]], device: torch.device) -> None:
        """What the next forward's rows are to be: (adapter, number of rows), in order."""
        active = dict.fromkeys(weights for weights, _ in segments if weights is not None).keys()
        self._is_on = bool(active)
        if not active or not self._covers(active):
            self._build(active)
        if not active:
            return
        owners = [weights for weights, count in segments for _ in range(count)]
        mine = [row for row, owner in enumerate(owners) if owner is not None]
        self._rows_T = None if len(mine) == len(owners) else torch.tensor(mine, device=device)
        self._others_TR = None if len(self._built) == 1 else self._others([owners[row] for row in mine], device)

    def _covers(self, active: KeysView[LoraWeights]) -> bool:
        """Whether what is built will do: adapters that left may stay until they are most of the work."""
        return active <= self._built.keys() and 2 * sum(one.rank for one in active) >= sum(one.rank for one in self._built)

    def _build(self, active: KeysView[LoraWeights]) -> None:
        self._built, self._wide, start = {}, {}, 0
        for weights in active:
            self._built[weights] = slice(start, start + weights.rank)
            start += weights.rank
        for name in {name for weights in active for name in weights.modules}:
            pairs = [_pair(weights, name, like=next(w for w in active if name in w.modules)) for weights in self._built]
            self._wide[name] = (_joined([a for a, _ in pairs]), _joined([b for _, b in pairs]))

    def _others(self, owners: Sequence[LoraWeights | None], device: torch.device) -> Tensor:
        width = sum(weights.rank for weights in self._built)
        others_TR = torch.ones((len(owners), width), dtype=torch.bool)
        for row, owner in enumerate(owners):
            if owner is not None:
                others_TR[row, self._built[owner]] = False
        return others_TR.to(device)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output_1TO: Tensor) -> Tensor | None:
            if not self._is_on or name not in self._wide:
                return None
            self._add(inputs[0][0], output_1TO[0], *self._wide[name])
            return output_1TO

        return add

    def _add(self, rows_TI: Tensor, output_TO: Tensor, a_RI: Tensor, b_RO: Tensor) -> None:
        if self._rows_T is not None:
            rows_TI = rows_TI[self._rows_T]
        inner_TR = rows_TI.to(a_RI.dtype) @ a_RI.T
        if self._others_TR is not None:
            inner_TR.masked_fill_(self._others_TR, 0)  # not a product with zero: a neighbour's overflow must not become NaN here
        delta_TO = (inner_TR @ b_RO).to(output_TO.dtype)
        if self._rows_T is None:
            output_TO.add_(delta_TO)
        else:
            output_TO.index_add_(0, self._rows_T, delta_TO)


def _pair(weights: LoraWeights, name: str, *, like: LoraWeights) -> tuple[Tensor, Tensor]:
    """This adapter's matrices, zeros for a module that it leaves alone."""
    if name in weights.modules:
        return weights.modules[name]
    a_RI, b_RO = like.modules[name]
    return a_RI.new_zeros((weights.rank, a_RI.shape[1])), b_RO.new_zeros((weights.rank, b_RO.shape[1]))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
