"""Keys and values of each sequence, and attention over them. Axes: L layers, K key-value heads, H heads, T time, D head width."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = 128


class SequenceCache:
    """One sequence's keys and values, in one buffer that doubles when it is full."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._layers, self._device = layers, device
        self._held: Tensor | None = None  # [2, L, K, capacity, D]
        self.length = 0

    def extend(self, layer: int, keys_KTD: Tensor, values_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new positions after the first `length`; gives back views of all, old and new.

        `length` itself moves when the step is complete: see `advance`.
        """
        end = self.length + keys_KTD.shape[1]
        held = self._room_for(end, keys_KTD)
        held[0, layer, :, self.length : end] = keys_KTD
        held[1, layer, :, self.length : end] = values_KTD
        return held[0, layer, :, :end], held[1, layer, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def _room_for(self, end: int, like_KTD: Tensor) -> Tensor:
        if self._held is not None and end <= self._held.shape[3]:
            return self._held
        heads, _, width = like_KTD.shape
        capacity = max(_SMALLEST, 1 << (end - 1).bit_length())
        grown = torch.empty((2, self._layers, heads, capacity, width), dtype=like_KTD.dtype, device=self._device)
        if self._held is not None:
            grown[:, :, :, : self.length] = self._held[:, :, :, : self.length]
        self._held = grown
        return grown


class Segment(NamedTuple):
    """Rows `start:end` of the step's tokens belong to the sequence of this cache."""

    cache: SequenceCache
    start: int
    end: int


def attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # a stand-in: what may be seen follows from the segments
    *,
    segments: list[Segment],
    scaling: float,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention for a step whose tokens of several sequences stand one after the other, without padding.

    transformers' attention interface: gives [1, T, H, D]. Each sequence is computed alone, so neighbours change nothing.
    """
    if unused.get("softcap") is not None:
        raise ValueError("attention with a soft cap is not served")
    layer = module.layer_idx
    assert isinstance(layer, int)
    parts = []
    for cache, start, end in segments:
        keys_KSD, values_KSD = cache.extend(layer, key_1KTD[0, :, start:end], value_1KTD[0, :, start:end])
        parts.append(_attend_one(query_1HTD[0, :, start:end], keys_KSD, values_KSD, scaling, sliding_window))
    return torch.cat(parts, dim=1).transpose(0, 1).unsqueeze(0), None


def _attend_one(query_HTD: Tensor, keys_KSD: Tensor, values_KSD: Tensor, scaling: float, window: int | None) -> Tensor:
    """The last T of S positions look at what lies before them."""
    heads, count, width = query_HTD.shape
    kv_heads, seen, _ = keys_KSD.shape
    if count == 1:  # one position sees all, so that heads sharing a key can stand in its place in time
        if window is not None:
            keys_KSD, values_KSD = keys_KSD[:, -window:], values_KSD[:, -window:]
        grouped_KGD = query_HTD.reshape(kv_heads, heads // kv_heads, width)
        out_KGD = _sdpa(grouped_KGD, keys_KSD, values_KSD, scaling)
        return out_KGD.reshape(heads, 1, width)
    keys_HSD, values_HSD = (held.repeat_interleave(heads // kv_heads, dim=0) for held in (keys_KSD, values_KSD))
    if count == seen and (window is None or window >= seen):
        return _sdpa(query_HTD, keys_HSD, values_HSD, scaling, is_causal=True)
    at_T1 = torch.arange(seen - count, seen, device=query_HTD.device)[:, None]
    at_S = torch.arange(seen, device=query_HTD.device)
    mask_TS = at_S <= at_T1
    if window is not None:
        mask_TS &= at_S > at_T1 - window
    return _sdpa(query_HTD, keys_HSD, values_HSD, scaling, mask_TS=mask_TS)


def _sdpa(
    query_HTD: Tensor,
    keys_HSD: Tensor,
    values_HSD: Tensor,
    scaling: float,
    *,
    mask_TS: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    return functional.scaled_dot_product_attention(
        query_HTD[None], keys_HSD[None], values_HSD[None], attn_mask=mask_TS, is_causal=is_causal, scale=scaling
    )[0]
