"""The planner's formulas against what others have published, and against what a run here has taken."""

from pathlib import Path

import pytest

from app.core import catalog, memory
from app.core.spec import QUANTIZATIONS, LoraSpec
from tests.core import published
from tests.core.published import Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "planner.md"
SMOL = catalog.load()["smollm2-135m-instruct"].architecture


@pytest.mark.parametrize("row", list(published.rows()), ids=lambda row: f"{row.source}: {row.what}")
def test_every_published_figure_is_met_within_a_tenth(row: Row) -> None:
    assert row.predicted == pytest.approx(row.published, rel=0.1), row


def test_the_document_shows_what_the_formulas_say() -> None:
    expected = "\n".join(row.markdown for row in published.rows())

    assert expected in DOCUMENT.read_text(), f"docs/planner.md should hold\n{expected}"


def test_parts_add_up_to_the_peak_and_only_the_larger_of_two_that_never_meet_counts() -> None:
    for tokens in (64, 4096):
        for is_checkpointing in (False, True):
            said = memory.predict(SMOL, LoraSpec(), micro_batch_tokens=tokens, is_checkpointing=is_checkpointing)
            parts = said.model_dump()
            unmet = min(parts["head"], parts["passing"])
            assert said.peak_bytes == sum(parts.values()) - unmet
            assert bool(said.checkpoints) == is_checkpointing
    assert said.tensor_bytes + said.slack + said.context == said.peak_bytes


def test_dropout_and_gemma_take_the_path_that_keeps_more() -> None:
    gemma = catalog.load()["gemma-3-1b-it"].architecture
    ours, dropping = LoraSpec(), LoraSpec(dropout=0.1)

    def kept(model: catalog.Architecture, lora: LoraSpec) -> int:
        return memory.predict(model, lora, micro_batch_tokens=1024).layers

    assert kept(SMOL, dropping) > 2 * kept(SMOL, ours)
    assert kept(gemma, ours) > 2 * kept(gemma.model_copy(update={"stock": False}), ours)


def test_an_adapter_on_fewer_modules_is_smaller() -> None:
    some = LoraSpec(target_modules=("q_proj", "v_proj"))

    assert memory.adapter_parameters(SMOL, some) == SMOL.layers * 16 * ((576 + 576) + (576 + 192))
    assert memory.adapter_parameters(SMOL, LoraSpec()) > memory.adapter_parameters(SMOL, some)


def test_states_in_32_bits_take_four_times_those_in_8() -> None:
    parameters = memory.adapter_parameters(SMOL, LoraSpec())
    eight, paged, full = (
        memory.predict(SMOL, LoraSpec(), micro_batch_tokens=64, trainer=memory.trainer_of(SMOL, LoraSpec(), "cuda", kind)).adapter
        for kind in ("adamw_8bit", "paged_adamw_8bit", "adamw_32bit")
    )

    assert eight == paged
    assert full - eight == pytest.approx(parameters * (8 - 2 - 8 / 256), abs=1)


def test_dora_trains_a_length_for_each_output() -> None:
    plain, dora = (memory.adapter_parameters(SMOL, LoraSpec(use_dora=use_dora)) for use_dora in (False, True))

    assert dora - plain == SMOL.layers * sum(outside for _, outside in SMOL.linear_shapes)


def test_only_what_is_quantized_is_made_dense() -> None:
    largest = max(i * o for i, o in SMOL.linear_shapes)
    for use_dora, more in ((False, 0), (True, 6)):
        lora = LoraSpec(use_dora=use_dora)
        dense = {
            name: memory.predict(SMOL, lora, micro_batch_tokens=64, quantization=held).dequantized / largest
            for name, held in QUANTIZATIONS.items()
        }
        assert dense.pop("none") == more
        assert set(dense.values()) == {2 + more}
