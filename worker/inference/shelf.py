"""Where the matrices of the active adapters lie side by side. Axes: R ranks of all of them, I/O in/out features."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from worker.inference.lora import LoraWeights


class Shelf:
    """Matrices of several adapters, one below the other.

    Who comes is copied beside those that are there; who is not needed stays until the place is. `end` ranks are or were
    somebody's.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._starts: dict[LoraWeights, int] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._room = self.end = 0

    @property
    def starts(self) -> Mapping[LoraWeights, int]:
        """Those that are there, and the first rank of each."""
        return self._starts

    def hold(self, active: Collection[LoraWeights]) -> None:
        """Make sure that all of these are there. Those that are not may go, and do before they are most of the work."""
        missing = [weights for weights in active if weights not in self._starts]
        needed = sum(weights.rank for weights in active)
        is_sparse = 2 * needed < self.end
        if not missing and not is_sparse:
            return
        self._starts = {weights: start for weights, start in self._starts.items() if weights in active}
        if is_sparse or not all(self._put(weights) for weights in missing):
            self._begin_anew(active, room=needed + needed // 2)

    def matrices(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [R, I] and B [R, O] of a module; None where nobody changes it. Ranks of others than a row's own are to be ignored."""
        if name not in self._pairs:
            return None
        a_RI, b_RO = self._pairs[name]
        return a_RI[: self.end], b_RO[: self.end]

    def _begin_anew(self, active: Collection[LoraWeights], *, room: int) -> None:
        self._starts, self._pairs, self._room, self.end = {}, {}, room, 0
        for weights in active:
            self._put(weights)

    def _put(self, weights: LoraWeights) -> bool:
        """Copy these into the first gap that is wide enough. False if none is."""
        start = 0
        for other, at in sorted(self._starts.items(), key=lambda one: one[1]):
            if at - start >= weights.rank:
                break
            start = at + other.rank
        end = start + weights.rank
        if end > self._room:
            return False
        for name, (a_RI, b_RO) in weights.modules.items():
            if name not in self._pairs:
                self._pairs[name] = self._zeros(a_RI.shape[1]), self._zeros(b_RO.shape[1])
        for name, wholes in self._pairs.items():
            for whole, part in zip(wholes, weights.modules.get(name, (None, None)), strict=True):
                whole[start:end] = 0 if part is None else part
        self._starts[weights], self.end = start, max(self.end, end)
        return True

    def _zeros(self, width: int) -> Tensor:
        return torch.zeros((self._room, width), dtype=self.dtype, device=self.device)
