"""Several adapters in one forward. Axes: T rows of the step, I/O in/out features, A active adapters, R ranks of them all."""

from collections.abc import Callable, KeysView, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


class LoraLayers:
    """Adds each row's own adapters to the linear layers of one model, by forward hooks. Rows of the base are not touched.

    A row's blend adds to the base's output what each adapter by itself would change in it, times its weight.

    The active adapters' matrices lie side by side, so that a layer costs two products however many there are (as in S-LoRA and
    Punica, without their kernels): every row meets every adapter, and all but its own ranks are then set to zero.
    """

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":  # its rows are the sampled ones, not those of the step
                module.register_forward_hook(self._hook(name))
        self._built: list[LoraWeights] = []
        self._owner_R = torch.empty(0, dtype=torch.long)  # of each rank, which of the built adapters it belongs to
        self._wide: dict[str, tuple[Tensor, Tensor]] = {}
        self._gains: dict[str, Tensor] = {}  # by module, those of every adapter [A, O], zeros where it has none
        self._rows_T: Tensor | None = None  # rows with an adapter; None when all have one
        self._shares_TA = torch.empty(0)  # of the rows with an adapter, how much each of those that are built counts
        self._others_TR: Tensor | None = None  # ranks that are not the row's own; None when there are no others
        self._weights_TR: Tensor | None = None  # how much each rank counts; None when its own ranks count once for every row
        self._is_on = False

    def use(self, segments: Sequence[tuple[Blend, int]], device: torch.device) -> None:
        """What the next forward's rows are to be: (adapters, number of rows), in order."""
        active = dict.fromkeys(weights for blend, _ in segments for weights, _ in blend).keys()
        self._is_on = bool(active)
        if not active or not self._covers(active):
            self._build(active, device)
        if not active:
            return
        places = {weights: place for place, weights in enumerate(self._built)}
        shares_TA = torch.zeros((sum(count for _, count in segments), len(places)))
        start = 0
        for blend, count in segments:
            for weights, share in blend:
                shares_TA[start : start + count, places[weights]] = share
            start += count
        mine_T = shares_TA.any(dim=1)
        self._rows_T = None if bool(mine_T.all()) else mine_T.nonzero()[:, 0].to(device)
        self._shares_TA = shares_TA[mine_T].to(device, next(iter(self._wide.values()))[0].dtype)
        weights_TR = self._shares_TA[:, self._owner_R]
        others_TR = weights_TR == 0
        self._others_TR = others_TR if bool(others_TR.any()) else None
        self._weights_TR = None if bool(((shares_TA == 0) | (shares_TA == 1)).all()) else weights_TR

    def _covers(self, active: KeysView[LoraWeights]) -> bool:
        """Whether what is built will do: adapters that left may stay until they are most of the work."""
        return active <= set(self._built) and 2 * sum(one.rank for one in active) >= sum(one.rank for one in self._built)

    def _build(self, active: KeysView[LoraWeights], device: torch.device) -> None:
        self._built, self._wide, self._gains = list(active), {}, {}
        ranks_A = torch.tensor([weights.rank for weights in active], dtype=torch.long)
        self._owner_R = torch.repeat_interleave(torch.arange(len(ranks_A)), ranks_A).to(device)
        for name in {name for weights in active for name in weights.modules}:
            pairs = [_pair(weights, name, like=next(w for w in active if name in w.modules)) for weights in self._built]
            self._wide[name] = (_joined([a for a, _ in pairs]), _joined([b for _, b in pairs]))
            if any(name in weights.gains for weights in active):
                like_O = pairs[0][1][0]
                self._gains[name] = torch.stack([weights.gains.get(name, torch.zeros_like(like_O)) for weights in self._built])

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output_1TO: Tensor) -> Tensor | None:
            if not self._is_on or name not in self._wide:
                return None
            self._add(inputs[0][0], output_1TO[0], *self._wide[name], self._more(name, module, output_1TO[0]))
            return output_1TO

        return add

    def _more(self, name: str, module: nn.Module, output_TO: Tensor) -> Tensor | None:
        """What the gains add to the rows with an adapter. A bias is no part of what they multiply."""
        if name not in self._gains:
            return None
        products_TO = output_TO if self._rows_T is None else output_TO[self._rows_T]
        if isinstance(module.bias, Tensor):
            products_TO = products_TO - module.bias
        return products_TO * (self._shares_TA @ self._gains[name])

    def _add(self, rows_TI: Tensor, output_TO: Tensor, a_RI: Tensor, b_RO: Tensor, more_TO: Tensor | None) -> None:
        if self._rows_T is not None:
            rows_TI = rows_TI[self._rows_T]
        inner_TR = rows_TI.to(a_RI.dtype) @ a_RI.T
        if self._others_TR is not None:
            inner_TR.masked_fill_(self._others_TR, 0)  # not a product with zero: a neighbour's overflow must not become NaN here
        if self._weights_TR is not None:
            inner_TR *= self._weights_TR
        delta_TO = inner_TR @ b_RO
        if more_TO is not None:
            delta_TO += more_TO
        delta_TO = delta_TO.to(output_TO.dtype)
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
