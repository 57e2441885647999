"""Causal attention of packed documents, each alone, so that neighbours can neither be seen nor cost anything.

On a GPU torch's varlen attention does it. On a CPU there is no such thing, and the backward of torch's own attention takes longer
than a layer's products: here documents of like lengths are laid side by side, the forward is torch's, the backward is products.

Axes: T time, H heads, K key-value heads, W width of a head, U = W/2, I = H·W, B documents of a bucket, S the longest's length,
t rows of a bucket's documents, P queries of all its heads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from worker.training.fused import Fused
from worker.training.kernels import rotate, turned
from worker.training.workspace import Kept

_PADDED = 1.2  # documents share a bucket while it holds no more than this times their tokens
_LENGTHS = 32  # lengths of buckets are multiples of it: each new size costs a CPU's products new machine code
_QUERIES_AT_ONCE = 256  # in the backward, of each head
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Bucket:
    """Neighbouring documents of like lengths, padded to the longest.

    `rows_BS` says which row of the T lies where; `is_row_BS1` where there is one. `slots_t` is the way back, of these documents'
    rows in order, which are `span` of the T: to b·S + s.
    """

    span: slice
    rows_BS: Tensor
    is_row_BS1: Tensor
    slots_t: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], first_row: int) -> "Bucket":
        lengths_B = np.asarray(lengths)
        at_S = np.arange(_rounded(lengths_B.max(), _LENGTHS))
        is_row_BS = at_S < lengths_B[:, None]
        first_B1 = first_row + (np.cumsum(lengths_B) - lengths_B)[:, None]
        return cls(
            span=slice(first_row, first_row + sum(lengths)),
            rows_BS=torch.from_numpy(np.where(is_row_BS, first_B1 + at_S, first_row)),
            is_row_BS1=torch.from_numpy(is_row_BS[:, :, None]),
            slots_t=torch.from_numpy(np.flatnonzero(is_row_BS)),
        )


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a packed row of T tokens, and how far each token turns (rotary tables [T, 1, W/2], fp32)."""

    lengths: tuple[int, ...]
    cos_T1U: Tensor
    sin_T1U: Tensor

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        buckets, start, taken = list[Bucket](), 0, 0
        for count in _bucketed(self.lengths):
            lengths = self.lengths[taken : taken + count]
            buckets.append(Bucket.of(lengths, start))
            start, taken = start + sum(lengths), taken + count
        return tuple(buckets)

    @cached_property
    def ends_B1(self) -> Tensor:
        """0, and where each document ends."""
        return torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32, device=self.cos_T1U.device)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _bucketed(lengths: Sequence[int]) -> Iterator[int]:
    """How many of the next documents share a bucket."""
    count = total = longest = 0
    for length in lengths:
        if count and (count + 1) * max(longest, length) > _PADDED * (total + length):
            yield count
            count = total = longest = 0
        count, total, longest = count + 1, total + length, max(longest, length)
    if count:
        yield count


Backward = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # the gradient of what came out; those of q, k and v, to be filled


def attend(q_THW: Tensor, k_TKW: Tensor, v_TKW: Tensor, documents: Documents, kept: Kept) -> tuple[Tensor, Backward]:
    """Rotary positions, then attention within each document: [T, H·W], and the way back."""
    if q_THW.is_cuda:
        return _varlen(q_THW, k_TKW, v_TKW, documents)
    return _bucketed_attention(q_THW, k_TKW, v_TKW, documents, kept)


def _varlen(q_THW: Tensor, k_TKW: Tensor, v_TKW: Tensor, documents: Documents) -> tuple[Tensor, Backward]:
    """Its backward is torch's own: of this one operation autograd keeps account."""
    cos_T1U, sin_T1U, ends_B1, longest = documents.cos_T1U, documents.sin_T1U, documents.ends_B1, max(documents.lengths)
    q_THW, k_TKW = rotate(q_THW, cos_T1U, sin_T1U), rotate(k_TKW, cos_T1U, sin_T1U)
    inputs = q, k, v = [x.detach().requires_grad_() for x in (q_THW, k_TKW, v_TKW)]
    is_grouped = q.shape[1] != k.shape[1]
    with torch.enable_grad():
        out_THW = varlen_attn(q, k, v, ends_B1, ends_B1, longest, longest, window_size=(-1, 0), enable_gqa=is_grouped)
    assert isinstance(out_THW, Tensor)

    def backward(d_out_TI: Tensor, d_q_THW: Tensor, d_k_TKW: Tensor, d_v_TKW: Tensor) -> None:
        d_q, d_k, d_v = torch.autograd.grad(out_THW, inputs, d_out_TI.view_as(out_THW))
        d_q_THW.copy_(rotate(d_q, cos_T1U, -sin_T1U))
        d_k_TKW.copy_(rotate(d_k, cos_T1U, -sin_T1U))
        d_v_TKW.copy_(d_v)

    return out_THW.detach().flatten(1), backward


@Fused
def _lay_out(
    q_THW: Tensor,
    k_TKW: Tensor,
    v_TKW: Tensor,
    cos_T1U: Tensor,
    sin_T1U: Tensor,
    rows_BS: Tensor,
    q_BHSW: Tensor,
    k_BKSW: Tensor,
    v_BKSW: Tensor,
) -> None:
    """Fill a bucket, q and k rotated. Where no row is it holds another's: no row of its document looks so far ahead."""
    cos, sin = cos_T1U[rows_BS], sin_T1U[rows_BS]
    for x_THW, x_BHSW in ((q_THW, q_BHSW), (k_TKW, k_BKSW)):
        x_BHSW.copy_(turned(x_THW[rows_BS], cos, sin).permute(0, 2, 1, 3))
    v_BKSW.copy_(v_TKW[rows_BS].permute(0, 2, 1, 3))


@Fused
def _take_up(x_BHSW: Tensor, slots_t: Tensor, x_tHW: Tensor) -> None:
    """Write a bucket's documents one after the other."""
    length = x_BHSW.shape[2]
    x_tHW.copy_(x_BHSW.permute(0, 2, 1, 3)[slots_t // length, slots_t % length])


@Fused
def _lay_out_gradient(d_out_THW: Tensor, out_THW: Tensor, rows_BS: Tensor, is_row_BS1: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, S, W], zero where no row is; and its products with what came out, [B, H, S, 1] in fp32."""
    d_out, out = torch.where(is_row_BS1[..., None], d_out_THW[rows_BS], 0), out_THW[rows_BS]
    delta = (d_out.float() * out.float()).sum(-1, keepdim=True)
    return d_out.permute(0, 2, 1, 3).contiguous(), delta.permute(0, 2, 1, 3).contiguous()


@Fused
def _take_up_gradients(
    d_q_BHSW: Tensor,
    d_k_BKSW: Tensor,
    d_v_BKSW: Tensor,
    cos_T1U: Tensor,
    sin_T1U: Tensor,
    rows_BS: Tensor,
    slots_t: Tensor,
    d_q_tI: Tensor,
    d_k_tI: Tensor,
    d_v_tI: Tensor,
) -> None:
    """Write a bucket's documents one after the other, q and k turned back."""
    length, rows_t = rows_BS.shape[1], rows_BS.flatten()[slots_t]
    which_t, at_t, cos, sin = slots_t // length, slots_t % length, cos_T1U[rows_t], sin_T1U[rows_t]
    for x_BHSW, x_tI in ((d_q_BHSW, d_q_tI), (d_k_BKSW, d_k_tI)):
        x_tI.copy_(turned(x_BHSW.permute(0, 2, 1, 3)[which_t, at_t], cos, -sin).flatten(1))
    d_v_tI.copy_(d_v_BKSW.permute(0, 2, 1, 3)[which_t, at_t].flatten(1))


@Fused
def _softmax_backward(
    scores_PS: Tensor, d_weights_PS: Tensor, log_total_P1: Tensor, delta_P1: Tensor, at_P1: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The weights, and the gradient of the scores before `scale`."""
    seen_PS = torch.arange(scores_PS.shape[1], device=scores_PS.device, dtype=torch.float32) <= at_P1
    logits_PS = (scores_PS.float() * scale - log_total_P1) * _LOG2_E
    weights_PS = torch.where(seen_PS, logits_PS.exp2(), 0)  # an exp that is used twice torch.compile would write to memory
    d_scores_PS = weights_PS * (d_weights_PS.float() - delta_P1) * scale
    return weights_PS.to(scores_PS.dtype), d_scores_PS.to(scores_PS.dtype)


def _bucketed_attention(q_THW: Tensor, k_TKW: Tensor, v_TKW: Tensor, documents: Documents, kept: Kept) -> tuple[Tensor, Backward]:
    kind, turn, saved = q_THW.dtype, (documents.cos_T1U, documents.sin_T1U), list[tuple[Tensor, ...]]()
    out_THW = kept.empty(tuple(q_THW.shape), dtype=kind)
    for bucket in documents.buckets:
        batch, length = bucket.rows_BS.shape
        laid = [kept.empty((batch, x.shape[1], length, x.shape[2]), dtype=kind) for x in (q_THW, k_TKW, v_TKW)]
        _lay_out(q_THW, k_TKW, v_TKW, *turn, bucket.rows_BS, *laid)
        out_BHSW, log_total_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*laid, is_causal=True)
        _take_up(out_BHSW, bucket.slots_t, out_THW[bucket.span])
        saved.append((*laid, log_total_BHS))

    def backward(d_out_TI: Tensor, d_q_THW: Tensor, d_k_TKW: Tensor, d_v_TKW: Tensor) -> None:
        d_out_THW, whole = d_out_TI.view_as(out_THW), [x.flatten(1) for x in (d_q_THW, d_k_TKW, d_v_TKW)]
        for bucket, (q, k, v, log_total) in zip(documents.buckets, saved, strict=True):
            d_out, delta = _lay_out_gradient(d_out_THW, out_THW, bucket.rows_BS, bucket.is_row_BS1)
            d_laid = _backward(d_out, delta, q, k, v, log_total)
            _take_up_gradients(*d_laid, *turn, bucket.rows_BS, bucket.slots_t, *(x[bucket.span] for x in whole))

    return out_THW.flatten(1), backward


def _backward(
    d_out_BHSW: Tensor, delta_BHS1: Tensor, q_BHSW: Tensor, k_BKSW: Tensor, v_BKSW: Tensor, log_total_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, over blocks of queries with the keys that they see (FlashAttention-2, arXiv:2307.08691).

    The queries of the heads that share keys stand in one product, so that keys are neither repeated nor their gradients summed.
    """
    batch, heads, length, width = q_BHSW.shape
    kv_heads = k_BKSW.shape[1]
    k_BSW, v_BSW = k_BKSW.flatten(0, 1), v_BKSW.flatten(0, 1)
    d_q_BHSW, d_k_BSW, d_v_BSW = torch.empty_like(q_BHSW), torch.empty_like(k_BSW), torch.empty_like(v_BSW)
    for start in reversed(range(0, length, _QUERIES_AT_ONCE)):  # the last one first: it sees all keys
        end = min(start + _QUERIES_AT_ONCE, length)
        q, d_out, delta, log_total = (
            x[:, :, start:end].reshape(batch * kv_heads, -1, x.shape[-1])
            for x in (q_BHSW, d_out_BHSW, delta_BHS1, log_total_BHS[..., None])
        )
        k, v = k_BSW[:, :end], v_BSW[:, :end]
        scores_PS, d_weights_PS = (q @ k.transpose(1, 2)).flatten(0, 1), (d_out @ v.transpose(1, 2)).flatten(0, 1)
        per_row = log_total.flatten(0, 1), delta.flatten(0, 1), _positions(start, end, batch * heads)
        of_rows = _softmax_backward(scores_PS, d_weights_PS, *per_row, 1 / math.sqrt(width))
        weights, d_scores = (x.view(len(q), -1, end) for x in of_rows)
        beta = float(end < length)  # nothing is there yet
        d_v_BSW[:, :end].baddbmm_(weights.transpose(1, 2), d_out, beta=beta)
        d_k_BSW[:, :end].baddbmm_(d_scores.transpose(1, 2), q, beta=beta)
        d_q_BHSW[:, :, start:end] = (d_scores @ k).view(batch, heads, end - start, width)
    return d_q_BHSW, d_k_BSW.view_as(k_BKSW), d_v_BSW.view_as(v_BKSW)


@lru_cache(maxsize=64)  # every layer asks for the same ones
def _positions(start: int, end: int, times: int) -> Tensor:
    return torch.arange(start, end, dtype=torch.float32).repeat(times)[:, None]
