"""What others have published of the memory that fine-tuning takes, beside what the planner's formulas say of the same run.

docs/planner.md shows the table; tests/core/test_memory.py holds the two together, and both within a tenth.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from app.core import catalog, memory
from app.core.catalog import Architecture
from app.core.memory import PerToken, Trainer
from app.core.spec import QUANTIZATIONS, LoraSpec, QuantizationName

# transformers and PEFT as they come, with gradient checkpointing: counted by a hook on saved tensors, without dropout.
# Logits are there in 16 and 32 bits, as a shifted copy (of transformers before 4.45), as log-probabilities and as gradients
PLAIN = Trainer(kept=PerToken(16, 0, 4, 8), passing=PerToken(4, 0, 0, 4), logits=18, slack=0, context_bytes=1e9)

LLAMA_FACTORY = replace(PLAIN, state_bytes=4 + 4 + 8)  # Adam in 32 bits
UNSLOTHS_BASELINE = replace(PLAIN, embedding_bytes=4)  # prepare_model_for_kbit_training makes embeddings and head 32-bit
# Adapter and gradient in 16 bits, Adam in 32; no context: the paper adds up tensors
QLORA_PAPER = replace(PLAIN, state_bytes=2 + 2 + 8, embedding_bytes=4, context_bytes=0)
NEWER = replace(PLAIN, logits=14, slack=0.05)  # without the shifted copy
CHUNKED = replace(NEWER, logits=None)


EIGHT = "llama-3.1-8b-instruct"


@dataclass(frozen=True)
class Row:
    """One figure. `unit` is that of both; GB are 10⁹ bytes."""

    source: str
    what: str
    unit: str
    published: float
    predicted: float

    @property
    def markdown(self) -> str:
        apart = self.predicted / self.published - 1
        figures = f"{_rounded(self.published)} | {_rounded(self.predicted)} | {self.unit} | {apart:+.1%}"
        return f"| {self.source} | {self.what} | {figures} |"


def rows() -> Iterator[Row]:
    for tokens, gb in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        what = f"Llama-2-7B, one row of {tokens:,} tokens"
        yield Row("LLaMA-Factory's wiki, A100", what, "GB", gb, _peak("llama-2-7b", 8, tokens, LLAMA_FACTORY))
    for tokens, gb in ((932, 12), (2551, 16), (5789, 24), (12264, 40), (15502, 48), (28454, 80)):
        what = f"Llama-3.1-8B, rank 32, one row of {tokens:,} tokens"
        yield Row("Unsloth's baseline, HF with FA2", what, "GB", gb, _peak(EIGHT, 32, tokens, UNSLOTHS_BASELINE))
    for size, gb in (("llama-2-7b", 6.9), ("llama-2-13b", 11.3), ("llama-33b", 24.7), ("llama-65b", 45.0)):
        what = f"{size.rpartition('-')[2].upper()}, rank 64, one row of 512 tokens"
        yield Row("QLoRA paper, memory by size", what, "GB", gb, _peak(size, 64, 512, QLORA_PAPER))
    for size, gb in _WEIGHTS.items():
        yield Row("weights in NF4, double quantization", size, "GB", gb, memory.weights_bytes(_architecture(size)) / 1e9)
    sixteen, eight_bit, nf4 = (memory.weights_bytes(_architecture(EIGHT), QUANTIZATIONS[name]) for name in _WAYS)
    yield Row("its own index, model.safetensors.index.json", f"{EIGHT} in 16 bits", "GB", 16.06, sixteen / 1e9)
    yield Row("JongYeop/Llama-3.1-8B-Instruct-INT8, one scale an output", f"{EIGHT} in 8 bits", "GB", 8.5, eight_bit / 1e9)
    what = f"{EIGHT} in bf16 less that in nf4, both generating"
    yield Row("derekl35/quantization-benchmarks, peak memory", what, "GB", 16.773 - 6.440, (sixteen - nf4) / 1e9)
    for name, trainer, tokens in (("full logits", NEWER, 7500), ("chunked cross-entropy", CHUNKED, 29500)):
        what = f"8B on 24 GB, {name}: tokens at once"
        yield Row("an estimate, before this was built", what, "tokens", tokens, _most_tokens(EIGHT, 24e9, trainer))
    seven, eight = _architecture("llama-2-7b"), _architecture(EIGHT)
    moments = memory.adapter_parameters(seven, LoraSpec(rank=16)) * (2 + 8 / 256)
    yield Row("8-bit Adam", "moments of rank 16 on a 7B", "MB", 85, moments / 1e6)
    wider = memory.weights_bytes(eight, embedding_bytes=4) - memory.weights_bytes(eight)
    yield Row("prepare_model_for_kbit_training", "embeddings and head of an 8B in 32 bits", "GB", 2, wider / 1e9)
    for has_two, bits in ((False, 4.5), (True, 4.127)):
        what = f"a parameter, {'double' if has_two else 'single'} quantization"
        yield Row("QLoRA paper", what, "bits", bits, 8 * memory.BYTES_PER_4_BIT[has_two])


_WAYS: tuple[QuantizationName, ...] = ("none", "int8", "nf4-single")  # bitsandbytes quantizes once unless told otherwise
_WEIGHTS = {
    "llama-2-7b": 3.87,
    "llama-2-13b": 7.20,
    "llama-33b": 17.4,
    "llama-65b": 34.5,
    EIGHT: 5.70,
    "llama-3.3-70b-instruct": 39.5,
    "qwen2.5-7b-instruct": 5.55,
    "qwen2.5-14b-instruct": 9.93,
    "qwen2.5-32b-instruct": 19.2,
}


def _architecture(name: str) -> Architecture:
    return catalog.load().sized(name).architecture


def _peak(name: str, rank: int, tokens: int, trainer: Trainer) -> float:
    lora, model = LoraSpec(rank=rank), _architecture(name)
    predicted = memory.predict(model, lora, micro_batch_tokens=tokens, trainer=trainer, is_checkpointing=True)
    return predicted.peak_bytes / 1e9


def _most_tokens(name: str, size_bytes: float, trainer: Trainer) -> int:
    fitting = takewhile(lambda tokens: _peak(name, 16, tokens, trainer) * 1e9 <= size_bytes, range(100, 100_000, 100))
    return max(fitting)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
