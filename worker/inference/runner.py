"""One forward over the tokens of many sequences, read or written, each with its own adapter and its own past."""

from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from worker.inference import sampling
from worker.inference.cache import KeyValuePool, attend, plan
from worker.inference.lora import Blend, LoraWeights
from worker.inference.lora_layers import LoraLayers
from worker.inference.sequence import Choice, Sequence, Slice

_ATTENTION = "tunesmith_ragged"


class ModelRunner:
    """Owns its model: hooks are set on it and its attention is replaced. Only one thread calls it.

    `page_count` pages of `page_size` tokens are kept of keys and values, in `cache_dtype`.
    """

    def __init__(self, model: Any, *, page_count: int, page_size: int) -> None:
        model.eval()
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
        model.config._attn_implementation = _ATTENTION
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self.device: torch.device = self._head.weight.device
        # as it was trained; on CPUs as the loops that apply it are written
        self.lora_dtype: torch.dtype = torch.float32 if self.device.type == "cpu" else self._head.weight.dtype
        self._lora = LoraLayers(model, self.device, dtype=self.lora_dtype)
        config = model.config.get_text_config()
        self._pool = KeyValuePool(config, count=page_count, size=page_size, dtype=cache_dtype(model), device=self.device)

    @torch.inference_mode()
    def run(self, slices: SequenceOf[Slice]) -> list[tuple[Sequence, Choice | None]]:
        """The next token of every sequence whose slice is its last; None where the model gave no distribution."""
        logits_BV, sequences = self.forward(slices)
        return list(zip(sequences, sampling.choose(logits_BV, sequences), strict=True)) if sequences else []

    @torch.inference_mode()
    def forward(self, slices: SequenceOf[Slice]) -> tuple[Tensor, list[Sequence]]:
        """Logits after the last token of each sequence whose slice is its last. Slices of one token stand first."""
        self._lora.use([(_blend(part.sequence), part.count) for part in slices])
        hidden_1TD = self._decoder(
            input_ids=torch.tensor([[token for part in slices for token in part.tokens]], device=self.device),
            position_ids=torch.tensor(
                [[at for part in slices for at in range(part.start, part.start + part.count)]], device=self.device
            ),
            attention_mask=torch.ones(
                (1, 1, 1, 1), dtype=torch.bool, device=self.device
            ),  # four axes: taken as it is, never built
            use_cache=False,
            pool=self._pool,
            step=plan(slices, size=self._pool.size, device=self.device),
        ).last_hidden_state
        ends = [end - 1 for end, part in zip(accumulate(part.count for part in slices), slices, strict=True) if part.is_last]
        return self._head(hidden_1TD[0, ends]), [part.sequence for part in slices if part.is_last]


def cache_dtype(model: Any) -> torch.dtype:
    """Of keys and values: the model's own, but 32 bits on CPUs, whose attention over pages is written for them."""
    head: Tensor = model.get_output_embeddings().weight
    return torch.float32 if head.device.type == "cpu" else head.dtype


def _blend(sequence: Sequence) -> Blend:
    assert all(isinstance(weights, LoraWeights) for weights, _ in sequence.adapters)
    return cast(Blend, sequence.adapters)
