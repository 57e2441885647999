"""One forward over the tokens of many sequences, read or written, each with its own adapter and its own past."""

from collections.abc import Sequence as SequenceOf
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from worker.inference import sampling
from worker.inference.cache import Segment, SequenceCache, attend
from worker.inference.lora import Blend, LoraLayers, LoraWeights
from worker.inference.sequence import Choice, Sequence, Slice

_ATTENTION = "tunesmith_ragged"


class ModelRunner:
    """Owns its model: hooks are set on it and its attention is replaced. Only one thread calls it."""

    def __init__(self, model: Any) -> None:
        model.eval()
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
        model.config._attn_implementation = _ATTENTION
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._layers = model.config.get_text_config().num_hidden_layers
        self.device: torch.device = self._head.weight.device
        # as it was trained; and on CPUs a small 16-bit product takes longer than a 32-bit one
        self.lora_dtype: torch.dtype = torch.float32 if self.device.type == "cpu" else self._head.weight.dtype
        self._lora = LoraLayers(model)
        self._caches: dict[Sequence, SequenceCache] = {}

    @torch.inference_mode()
    def run(self, slices: SequenceOf[Slice]) -> list[tuple[Sequence, Choice | None]]:
        """The next token of every sequence whose slice is its last; None where the model gave no distribution."""
        logits_BV, sequences = self.forward(slices)
        return list(zip(sequences, sampling.choose(logits_BV, sequences), strict=True)) if sequences else []

    @torch.inference_mode()
    def forward(self, slices: SequenceOf[Slice]) -> tuple[Tensor, list[Sequence]]:
        """Logits after the last token of each sequence whose slice is its last."""
        segments = self._segments(slices)
        self._lora.use([(_blend(part.sequence), part.count) for part in slices], self.device)
        hidden_1TD = self._decoder(
            input_ids=torch.tensor([[token for part in slices for token in part.tokens]], device=self.device),
            position_ids=torch.tensor(
                [[at for part in slices for at in range(part.start, part.start + part.count)]], device=self.device
            ),
            attention_mask=torch.ones(
                (1, 1, 1, 1), dtype=torch.bool, device=self.device
            ),  # four axes: taken as it is, never built
            use_cache=False,
            segments=segments,
        ).last_hidden_state
        for segment, part in zip(segments, slices, strict=True):
            segment.cache.advance(part.count)
        ends = [segment.end - 1 for segment, part in zip(segments, slices, strict=True) if part.is_last]
        return self._head(hidden_1TD[0, ends]), [part.sequence for part in slices if part.is_last]

    def free(self, sequence: Sequence) -> None:
        self._caches.pop(sequence, None)

    def _segments(self, slices: SequenceOf[Slice]) -> list[Segment]:
        segments, start = [], 0
        for part in slices:
            cache = self._caches.setdefault(part.sequence, SequenceCache(self._layers, self.device))
            assert cache.length == part.start, "a sequence's cache and its schedule disagree"
            segments.append(Segment(cache, start, start + part.count))
            start += part.count
        return segments


def _blend(sequence: Sequence) -> Blend:
    assert all(isinstance(weights, LoraWeights) for weights, _ in sequence.adapters)
    return cast(Blend, sequence.adapters)
