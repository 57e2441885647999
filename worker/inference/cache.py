"""Keys and values in pages, and attention over them.

Axes: T tokens of the step, B rows that decode, J places in a page table, N pages, P positions in a page, K key-value heads,
H heads, S positions seen, D head width.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.inference import decode_attention
from worker.inference.sequence import Slice


def page_bytes(config: Any, *, size: int, dtype: torch.dtype) -> int:
    """What a page of `size` tokens takes in all layers of the model with this configuration."""
    kv_heads, width = _heads(config)
    return int(2 * config.num_hidden_layers * kv_heads * size * width * dtype.itemsize)


class KeyValuePool:
    """Room for the keys and values of `count` pages in every layer, [N, K, P, D] each."""

    def __init__(self, config: Any, *, count: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        kv_heads, width = _heads(config)
        shape = (config.num_hidden_layers, count, kv_heads, size, width)
        self.size, self.dtype, self.device = size, dtype, device
        self._keys_LNKPD, self._values_LNKPD = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        return self._keys_LNKPD[number], self._values_LNKPD[number]


def _heads(config: Any) -> tuple[int, int]:
    """Key-value heads and their width."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, width


@dataclass(frozen=True)
class Reading:
    """Tokens `start:end` of the step are of one sequence, in whose pages `seen` positions stand, these among them."""

    start: int
    end: int
    seen: int
    pages_J: Tensor


@dataclass(frozen=True)
class Step:
    """Where the tokens of one step are written, and what they look at. Those that decode come first, one a row."""

    page_T: Tensor
    offset_T: Tensor
    tables_BJ: Tensor
    lengths_B: Tensor
    reading: tuple[Reading, ...]

    @property
    def decoding(self) -> int:
        return len(self.lengths_B)


def plan(slices: SequenceOf[Slice], *, size: int, device: torch.device) -> Step:
    """Of slices that stand one after the other, single tokens first."""
    places = [(part, at) for part in slices for at in range(part.start, part.start + part.count)]
    rows = [part for part in slices if part.count == 1]
    longest = max((len(part.sequence.pages) for part in rows), default=0)
    tables = [part.sequence.pages + [0] * (longest - len(part.sequence.pages)) for part in rows]
    reading, start = list[Reading](), len(rows)
    for part in slices[len(rows) :]:
        assert part.count > 1, "a single token after a longer slice"
        seen = part.start + part.count
        pages_J = torch.tensor(part.sequence.pages[: -(-seen // size)], device=device)
        reading.append(Reading(start, start + part.count, seen, pages_J))
        start += part.count
    return Step(
        page_T=torch.tensor([part.sequence.pages[at // size] for part, at in places], device=device),
        offset_T=torch.tensor([at % size for _, at in places], device=device),
        tables_BJ=torch.tensor(tables, dtype=torch.int32, device=device).view(len(rows), longest),
        lengths_B=torch.tensor([part.start + 1 for part in rows], dtype=torch.int32, device=device),
        reading=tuple(reading),
    )


def attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  # a stand-in: what may be seen follows from the step
    *,
    pool: KeyValuePool,
    step: Step,
    scaling: float,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention for a step whose tokens of several sequences stand one after the other, without padding.

    transformers' attention interface: gives [1, T, H, D]. What a token sees is its own sequence's pages and nothing else.
    """
    if unused.get("softcap") is not None:
        raise ValueError("attention with a soft cap is not served")
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys_NKPD, values_NKPD = pool.layer(layer)
    keys_NKPD[step.page_T, :, step.offset_T] = key_1KTD[0].transpose(0, 1).to(pool.dtype)
    values_NKPD[step.page_T, :, step.offset_T] = value_1KTD[0].transpose(0, 1).to(pool.dtype)
    query_THD = query_1HTD[0].transpose(0, 1)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    if rows := step.decoding:
        decode = decode_on_cpu if pool.device.type == "cpu" else decode_anywhere
        out_THD[:rows] = decode(query_THD[:rows], keys_NKPD, values_NKPD, step, scaling, sliding_window)
    for part in step.reading:
        keys_KSD, values_KSD = (_gathered(pages_NKPD, part).to(query_THD.dtype) for pages_NKPD in (keys_NKPD, values_NKPD))
        out_HTD = _read(query_1HTD[0, :, part.start : part.end], keys_KSD, values_KSD, scaling, sliding_window)
        out_THD[part.start : part.end] = out_HTD.transpose(0, 1)
    return out_THD[None], None


def decode_on_cpu(
    query_BHD: Tensor, keys_NKPD: Tensor, values_NKPD: Tensor, step: Step, scaling: float, window: int | None
) -> Tensor:
    """Attention of the step's single tokens, each over its own pages; with a window, over the last so many positions of them."""
    out_BHD = torch.empty(query_BHD.shape, dtype=torch.float32)
    decode_attention.attend(
        query_BHD.float().contiguous().numpy(),
        keys_NKPD.numpy(),
        values_NKPD.numpy(),
        step.tables_BJ.numpy(),
        step.lengths_B.numpy(),
        np.float32(scaling),
        window or np.iinfo(np.int32).max,
        out_BHD.numpy(),
    )
    return out_BHD


def decode_anywhere(
    query_BHD: Tensor, keys_NKPD: Tensor, values_NKPD: Tensor, step: Step, scaling: float, window: int | None
) -> Tensor:
    """The same by PyTorch's operators, for any device. Heads that share a key stand in place of time."""
    rows, heads, width = query_BHD.shape
    kv_heads, size = keys_NKPD.shape[1:3]
    seen = step.tables_BJ.shape[1] * size
    at_S = torch.arange(seen, device=query_BHD.device)
    lengths_B1 = step.lengths_B[:, None]
    mask_BS = at_S < lengths_B1
    if window is not None:
        mask_BS &= at_S >= lengths_B1 - window
    # what is not seen may be another's, and its NaN would come through a weight of zero
    unseen_BKSD = ~mask_BS[:, None, :, None]
    keys_BKSD, values_BKSD = (
        pages_NKPD[step.tables_BJ].transpose(1, 2).reshape(rows, kv_heads, seen, width).masked_fill_(unseen_BKSD, 0)
        for pages_NKPD in (keys_NKPD, values_NKPD)
    )
    out_BKGD = functional.scaled_dot_product_attention(
        query_BHD.view(rows, kv_heads, heads // kv_heads, width),
        keys_BKSD,
        values_BKSD,
        attn_mask=mask_BS[:, None, None],
        scale=scaling,
    )
    return out_BKGD.reshape(rows, heads, width)


def _gathered(pages_NKPD: Tensor, part: Reading) -> Tensor:
    """What the sequence's pages hold, as [K, S, D]."""
    _, kv_heads, _, width = pages_NKPD.shape
    return pages_NKPD[part.pages_J].transpose(0, 1).reshape(kv_heads, -1, width)[:, : part.seen]


def _read(query_HTD: Tensor, keys_KSD: Tensor, values_KSD: Tensor, scaling: float, window: int | None) -> Tensor:
    """The last T of S positions look at what lies before them."""
    heads, count, _ = query_HTD.shape
    kv_heads, seen, _ = keys_KSD.shape
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
