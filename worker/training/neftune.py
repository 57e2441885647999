"""NEFTune (arXiv:2310.05914): noise on the embeddings while training."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noised(embeddings: nn.Module, lengths: Sequence[int], *, alpha: float) -> Iterator[None]:
    """Within the block the embeddings of a pack of documents get noise of up to alpha / √(length · width), each its own length.

    It is drawn from torch's generator: of a step that was seeded, the same each time. No noise with an alpha of 0.
    """
    if not alpha:
        yield
        return

    def add(_module: nn.Module, _inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        width = embedded.shape[-1]
        bounds_T1 = torch.cat([torch.full((length, 1), alpha / math.sqrt(length * width)) for length in lengths])
        noise_TD = (2 * torch.rand(len(bounds_T1), width) - 1) * bounds_T1
        return embedded + noise_TD.to(embedded).view_as(embedded)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
