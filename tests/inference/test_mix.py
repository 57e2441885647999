"""Several adapters in one answer: the base and, times its weight, what each of them by itself would change."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from app.core.engine import AdapterRef, GenerateRequest, Share
from app.core.errors import BadRequest
from tests.inference import make
from tests.inference.conftest import OpenDriver
from worker.inference.driver import EngineDriver
from worker.model.base import LoadedBase

Mix = dict[str, float]
MIXES: list[Mix] = [{"first": 0.7, "second": 0.3}, {"first": 1.0, "third": -0.5}, {"first": 0.3, "second": 0.7}]


@pytest.fixture(scope="module")
def by_hand(load_tiny: Callable[[], LoadedBase], trained: dict[str, PeftModel]) -> Callable[[Mix, list[int]], str]:
    """Greedy answers of a base to whose layers the products are added one by one."""
    base, weights = load_tiny(), dict[str, float]()
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(_adding(name, trained, weights))

    def answer(mix: Mix, prompt: list[int]) -> str:
        weights.clear()
        weights.update(mix)
        return make.words(base.model, base.renderer, prompt)

    return answer


def _adding(name: str, trained: dict[str, PeftModel], weights: Mix) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for adapter, weight in weights.items():
            layer = trained[adapter].base_model.model.get_submodule(name)
            if hasattr(layer, "lora_A"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                output = output + weight * layer.scaling["default"] * (inputs[0] @ a.T @ b.T)
        return output

    return add


def wanted(mix: Mix, published: dict[str, AdapterRef], prompt: list[int]) -> GenerateRequest:
    shares = tuple(Share(adapter=published[name], weight=weight) for name, weight in mix.items())
    return make.request(prompt).model_copy(update={"mix": shares})


async def said(driver: EngineDriver, requests: list[GenerateRequest]) -> list[str]:
    return [make.text_of(told) for told in await asyncio.gather(*(make.answer(driver, one) for one in requests))]


@torch.inference_mode()
def test_mixes_say_what_the_sum_says_and_leave_the_others_alone(
    open_driver: OpenDriver,
    oracle: LoadedBase,
    published: dict[str, AdapterRef],
    trained: dict[str, PeftModel],
    by_hand: Callable[[Mix, list[int]], str],
) -> None:
    driver, prompt = open_driver(), make.PROMPTS[2]
    asked = [wanted(mix, published, prompt) for mix in MIXES]
    alone = [make.request(prompt), make.request(prompt, published["first"])]
    expected = [by_hand(mix, prompt) for mix in MIXES]
    plain = [make.words(model, oracle.renderer, prompt) for model in (oracle.model, trained["first"])]

    assert len({*expected, *plain}) == 5  # the comparison could have failed
    assert asyncio.run(said(driver, asked[:1])) == expected[:1]
    assert asyncio.run(said(driver, [*asked, *alone])) == [*expected, *plain]
    assert asyncio.run(said(driver, [*alone, *asked])) == [*plain, *expected]  # now from the prefix cache
    assert all(driver.evict(one.digest) for one in published.values())


def test_mixes_that_need_every_slot_do_not_wait_for_each_other_for_ever(
    open_driver: OpenDriver, published: dict[str, AdapterRef]
) -> None:
    driver = open_driver(max_adapters=2)
    asked = [wanted(MIXES[number % 2], published, [65 + number]) for number in range(6)]

    assert asyncio.run(said(driver, asked)) == [asyncio.run(said(driver, [one]))[0] for one in asked]


def test_more_adapters_than_slots_are_refused(open_driver: OpenDriver, published: dict[str, AdapterRef]) -> None:
    with pytest.raises(BadRequest) as refusal:
        asyncio.run(said(open_driver(max_adapters=1), [wanted(MIXES[0], published, [65])]))
    assert refusal.value.param == "adapters"
