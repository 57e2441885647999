"""What the runner computes in 16 bits, as on GPUs and CPUs made for it: the 32-bit logits within what rounding explains."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from app.core import catalog
from tests import make as rows
from tests.inference import make
from worker.inference import lora, unpacked
from worker.inference.lora import LoraWeights
from worker.inference.pages import Pages
from worker.inference.runner import ModelRunner
from worker.inference.sequence import Choice, Sequence, Slice
from worker.model import base as bases
from worker.model.adapter import AdapterWeights
from worker.model.base import LoadedBase

TOLERANCE = 0.03  # of the logits' spread, root mean square; bf16 keeps 8 bits


def weights_of(model: PeftModel) -> LoraWeights:
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    pairs = {name: (layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data) for name, layer in layers.items()}
    first = next(iter(layers.values()))
    return lora.prepare(AdapterWeights(first.r["default"], first.scaling["default"], pairs, {}), dtype=torch.float32)


@pytest.mark.parametrize("is_unpacked", [True, False])
@torch.inference_mode()
def test_prompt_and_answer_in_16_bits(
    bases_dir: Path, oracle: LoadedBase, trained: dict[str, PeftModel], is_unpacked: bool
) -> None:
    base = bases.load(catalog.load()[rows.TINY], bases_dir, dtype=torch.bfloat16, device="cpu", for_training=False)
    unpacked.enable(base.model, dtype=torch.bfloat16, max_bytes=2**30 if is_unpacked else 0)
    pages = Pages(count=8, size=16)
    runner = ModelRunner(base.model, page_count=pages.count, page_size=pages.size)
    tokens, wanted = [3 + at % 250 for at in range(40)], make.request([3 + at % 250 for at in range(33)])
    for model, adapters in ((oracle.model, ()), (trained["first"], ((weights_of(trained["first"]), 1.0),))):
        sequence = Sequence(
            wanted, vocabulary=make.vocabulary(base.renderer), max_tokens=9, emit=lambda _: None, adapters=adapters
        )
        sequence.pages = pages.take(4)
        found = [runner.forward([Slice(sequence, 0, 33)])[0][0]]
        for at in range(33, len(tokens)):
            sequence.accept(Choice(tokens[at]))
            found.append(runner.forward([Slice(sequence, at, 1)])[0][0])
        expected_TV = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, 32:]
        pages.release(sequence.pages)

        apart = (torch.stack(found).float() - expected_TV).square().mean().sqrt()
        assert apart < TOLERANCE * expected_TV.std(), float(apart / expected_TV.std())
