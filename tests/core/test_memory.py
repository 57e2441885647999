"""The planner's formulas against the weights that training with NF4 and double quantization is known to need."""

import pytest

from app.core import catalog, memory
from app.core.catalog import Architecture
from app.core.spec import LoraSpec

LLAMA_2_7B = Architecture(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000, tied=False)


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("llama-3.1-8b-instruct", 5.70),
        ("llama-3.3-70b-instruct", 39.5),
        ("qwen2.5-7b-instruct", 5.55),
        ("qwen2.5-32b-instruct", 19.2),
    ],
)
def test_the_weights_of_the_catalog_are_as_published(model: str, gigabytes: float) -> None:
    assert memory.weights_bytes(catalog.load()[model].architecture) / 1e9 == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(("context", "published_gb"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)])
def test_the_peak_of_llama_2_7b_is_within_ten_percent_of_the_published_one(context: int, published_gb: float) -> None:
    """LLaMA-Factory's wiki, A100, 4-bit, batch of one; the figures there are whole gigabytes."""
    predicted = memory.predict(
        LLAMA_2_7B, LoraSpec(rank=8), micro_batch_tokens=context, is_checkpointing=True, is_loss_chunked=False
    )

    assert predicted.peak_bytes / 1e9 == pytest.approx(published_gb, rel=0.1, abs=0.5)


def test_double_quantization_saves_what_the_paper_says() -> None:
    assert 8 * (memory.BYTES_PER_NF4[False] - memory.BYTES_PER_NF4[True]) == pytest.approx(0.373, abs=0.001)
