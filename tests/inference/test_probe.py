"""What may answer has been looked at: it adds numbers, and it adds something."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from app.core.engine import AdapterRef
from app.core.errors import BadRequest
from app.core.storage import Storage
from tests.inference import make
from tests.inference.conftest import OpenDriver
from worker.inference import probe
from worker.inference.lora import LoraWeights
from worker.model.adapter import AdapterRefused
from worker.model.base import LoadedBase


def weights(a: float, b: float) -> LoraWeights:
    return LoraWeights(2, {"q_proj": (torch.full((2, 8), a), torch.full((2, 8), b))}, {})


def test_an_adapter_that_has_learnt_nothing_yet_is_the_base() -> None:
    probe.require_sane(weights(a=1.0, b=0.0))


@pytest.mark.parametrize(
    ("a", "b", "words"), [(1e30, 1e30, "q_proj is not finite"), (0.0, 1.0, "changes nothing"), (1e-30, 1e-30, "changes nothing")]
)
def test_what_adds_no_numbers_or_nothing_is_refused(a: float, b: float, words: str) -> None:
    with pytest.raises(AdapterRefused, match=words):
        probe.require_sane(weights(a, b))


def test_a_refused_adapter_says_why_and_harms_no_one(
    open_driver: OpenDriver,
    load_tiny: Callable[[], LoadedBase],
    oracle: LoadedBase,
    trained: dict[str, PeftModel],
    published: dict[str, AdapterRef],
    storage: Storage,
    tmp_path: Path,
) -> None:
    model = make.peft_model(load_tiny(), rank=2, seed=9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(1e30)
    broken = make.publish(storage, oracle, model, tmp_path / "broken")
    driver, told = open_driver(), list[str]()

    async def ask(ref: AdapterRef) -> str:
        with contextlib.suppress(BadRequest):
            return make.text_of(await make.answer(driver, make.request(ref=ref)))
        told.append(ref.id)
        return ""

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(ask(ref) for ref in (broken, published["first"], broken, published["second"])))

    expected = [make.words(trained[name], oracle.renderer, make.PROMPTS[0]) for name in ("first", "second")]
    assert asyncio.run(all_at_once()) == ["", expected[0], "", expected[1]]
    assert told == ["broken", "broken"]
    assert driver.stats().refused_adapters == 1  # and not looked at twice
    with pytest.raises(BadRequest, match="not finite") as refusal:
        asyncio.run(make.answer(driver, make.request(ref=broken)))
    assert refusal.value.code == "adapter_refused"
