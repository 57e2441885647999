"""Memory for what a forward keeps for its backward: taken piece by piece, given back all at once, used again.

From malloc, what stays and what passes would lie by turns: the heap of a CPU process grows to twice of what is held, and every
fresh page of it costs as much as writing it.
"""

import ctypes
import sys

import torch
from torch import Tensor

_BLOCK_BYTES = 32 * 2**20
_ALIGNMENT = 64
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_pages() -> None:
    """For a process that does nothing but train: its heap keeps the pages that it has had, for the next tensor of the kind."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


class Kept:
    """One forward's part of a workspace. It goes back when nobody holds this object any more: a backward lets go of it."""

    def __init__(self, free: list[Tensor], device: torch.device) -> None:
        self._free, self._device = free, device
        self._blocks: list[Tensor] = []
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Not initialized. Whoever keeps the tensor keeps this object too."""
        needed = torch.Size(shape).numel() * dtype.itemsize
        if not self._blocks or self._used + needed > self._blocks[-1].numel():
            self._blocks.append(self._block(needed + _ALIGNMENT))
            self._used = _ALIGNMENT  # never 0, which torch.compile takes for a case of its own
        piece = self._blocks[-1][self._used : self._used + needed]
        self._used += -(-needed // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(shape)

    def _block(self, needed: int) -> Tensor:
        for position, block in enumerate(self._free):
            if block.numel() >= needed:
                return self._free.pop(position)
        return torch.empty(max(needed, _BLOCK_BYTES), dtype=torch.uint8, device=self._device)

    def __del__(self) -> None:
        self._free.extend(self._blocks)


class Workspace:
    """As large as the largest forward so far."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def open(self, device: torch.device) -> Kept:
        return Kept(self._free, device)
