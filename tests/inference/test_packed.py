"""The fast kernels are used where they say the same, and nowhere else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from app.core import catalog
from tests import make as rows
from worker.inference import packed
from worker.model import base as bases
from worker.model.base import LoadedBase

pytestmark = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no packed kernels")

PROBE = range(20, 52)


@pytest.fixture
def base(bases_dir: Path) -> LoadedBase:
    return bases.load(catalog.load()[rows.TINY], bases_dir, device="cpu", for_training=False)


def logits(base: LoadedBase) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = base.model(input_ids=torch.arange(20)[None]).logits.float()
    return found


def test_packed_weights_say_nearly_the_same(base: LoadedBase) -> None:
    plain = logits(base)

    assert packed.enable(base.model, PROBE) is True
    assert float((logits(base) - plain).square().mean().sqrt() / plain.std()) < packed.TOLERANCE


def test_a_base_that_they_change_too_much_keeps_its_own_weights(base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = logits(base)
    monkeypatch.setattr(packed, "TOLERANCE", 0.0)

    assert packed.enable(base.model, PROBE) is False
    assert torch.equal(logits(base), plain)


def test_a_base_in_fp32_is_left_alone(load_tiny: Callable[[], LoadedBase]) -> None:
    base = load_tiny()
    plain = logits(base)

    assert packed.enable(base.model, PROBE) is False
    assert torch.equal(logits(base), plain)
