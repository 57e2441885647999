"""Attention in packed micro-batches: each document alone, so that neighbours can neither be seen nor cost anything.

A mask of the whole pack would be T × T; the documents' own squares are much less. Axes: H heads, K key-value heads, T time,
D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "tunesmith_packed"


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Within, forwards of `model` take `documents=`: the lengths of the documents in their one row."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
    _module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: tuple[int, ...],
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: gives [1, T, H, D]."""
    if attention_mask is not None or unused.get("softcap") is not None:
        raise ValueError("packed attention knows neither masks nor soft caps")
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    parts = (torch.split(tensor, list(documents), dim=2) for tensor in (query_1HTD, key_1KTD, value_1KTD))
    out = [
        functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attn_mask=_window(query.shape[2], sliding_window, query.device),
            is_causal=sliding_window is None or sliding_window >= query.shape[2],
            dropout_p=dropout,
            scale=scaling,
        )
        for query, key, value in zip(*parts, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _window(length: int, width: int | None, device: torch.device) -> Tensor | None:
    """Which of `length` positions see which, where a layer looks back only `width`; None where that is all of them."""
    if width is None or width >= length:
        return None
    at_T = torch.arange(length, device=device)
    back_TT = at_T[:, None] - at_T[None, :]
    return (back_TT >= 0) & (back_TT < width)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
