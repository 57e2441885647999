"""transformers' own forward with PEFT's layers, for what decoder.py does not know: other models, dropout.

A mask of the whole pack would be T × T; the documents' own squares are much less. Axes: H heads, K key-value heads, T time,
D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_ATTENTION = "tunesmith_packed"


class StockDecoder:
    """`model` is transformers' decoder, with PEFT's layers in it. `is_checkpointing` is as `decoder.Decoder` has it."""

    def __init__(self, model: Any, *, is_checkpointing: bool = False) -> None:
        self._model, self._is_checkpointing = model, is_checkpointing

    @torch.enable_grad()
    def forward(
        self, rows_N: Tensor, *, tokens_T: Tensor, positions_T: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The last hidden states, normed, of the wanted rows only, [N, D]; and the way back from their gradient.

        The decoder sees neither cache nor mask: given either, transformers would let packed documents see each other.
        LoRA is computed in the base's own 16 bits, from fp32 masters.
        """
        kind, device = self._model.embed_tokens.weight.dtype, tokens_T.device.type
        with self._packing(), self._checkpointing(), torch.autocast(device, torch.bfloat16, enabled=kind == torch.bfloat16):
            hidden_1TD: Tensor = self._model(
                input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False, documents=tuple(lengths)
            ).last_hidden_state
        hidden_ND = hidden_1TD[0, rows_N]
        return hidden_ND.detach(), lambda d_hidden_ND: torch.autograd.backward(hidden_ND, d_hidden_ND)

    @contextmanager
    def _packing(self) -> Iterator[None]:
        config = self._model.config
        before, config._attn_implementation = config._attn_implementation, _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """transformers' own switch would leave a hook on the embeddings. What is computed again is computed in the backward."""
        recomputed = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self._packing()))
        for layer in self._model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = self._is_checkpointing, recomputed
        try:
            yield
        finally:
            for layer in self._model.layers:
                layer.gradient_checkpointing = False


def _attend(
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


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
