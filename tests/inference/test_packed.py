"""The fast kernels are used where they say the same, and nowhere else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from app.core import catalog
from app.core.spec import QUANTIZATIONS, QuantizationName
from tests import make as rows
from worker.inference import packed
from worker.model import base as bases
from worker.model.base import LoadedBase

pytestmark = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no packed kernels")

PROBE = range(20, 52)


@pytest.fixture
def load(bases_dir: Path) -> Callable[[QuantizationName], LoadedBase]:
    def loaded(name: QuantizationName) -> LoadedBase:
        tiny, held = catalog.load()[rows.TINY], QUANTIZATIONS[name]
        return bases.load(tiny, bases_dir, quantization=held, device="cpu", for_training=False)

    return loaded


@pytest.fixture
def base(load: Callable[[QuantizationName], LoadedBase]) -> LoadedBase:
    return load("nf4")


def logits(base: LoadedBase) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = base.model(input_ids=torch.arange(20)[None]).logits.float()
    return found


@pytest.mark.parametrize("name", [name for name, held in QUANTIZATIONS.items() if held.is_4_bit])
def test_packed_weights_say_nearly_the_same(name: QuantizationName, load: Callable[[QuantizationName], LoadedBase]) -> None:
    base = load(name)
    plain = logits(base)

    assert packed.enable(base.model, PROBE) is True
    packed_logits = logits(base)
    assert 0 < float((packed_logits - plain).square().mean().sqrt() / plain.std()) < packed.TOLERANCE


def test_a_base_that_they_change_too_much_keeps_its_own_weights(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(base)
    monkeypatch.setattr(packed, "TOLERANCE", 0.0)

    assert packed.enable(base.model, PROBE) is False
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("name", ["int8", "none"])
def test_a_base_that_is_not_in_4_bits_has_none(
    name: QuantizationName, load: Callable[[QuantizationName], LoadedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_logits", lambda *_: pytest.fail("it was compared with nothing"))

    assert packed.enable(load(name).model, PROBE) is False


def test_a_base_in_fp32_is_left_alone(load_tiny: Callable[[], LoadedBase]) -> None:
    base = load_tiny()
    plain = logits(base)

    assert packed.enable(base.model, PROBE) is False
    assert torch.equal(logits(base), plain)
