"""An engine holds its base in one way, and answers for the adapters that were trained on it held so: for no others."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.core import catalog
from app.core.engine import AdapterRef
from app.core.errors import BadRequest, Unavailable
from app.core.settings import InferenceSettings
from app.core.spec import QUANTIZATIONS, USUAL, QuantizationName
from app.core.storage import Storage
from app.inference import engines
from app.models import Engine
from tests import make as rows
from tests.inference import make
from worker.inference import native
from worker.model import base as bases
from worker.model.base import LoadedBase


def load(cache_dir: Path, name: str) -> LoadedBase:
    held = QUANTIZATIONS[name]
    return bases.load(
        catalog.load()[rows.TINY], cache_dir, quantization=held, dtype=torch.float32, device="cpu", for_training=False
    )


@pytest.fixture(params=[name for name in QUANTIZATIONS if name != USUAL])
def name(request: pytest.FixtureRequest) -> QuantizationName:
    found: QuantizationName = request.param
    return found


@pytest.fixture
def usual(bases_dir: Path, storage: Storage, tmp_path: Path) -> Iterator[native.NativeDriver]:
    settings = InferenceSettings(base=rows.TINY)
    driver = native.open_driver(load(bases_dir, USUAL), storage, cache_dir=tmp_path / "usual", settings=settings)
    yield driver
    driver.close()


def test_an_engine_answers_for_adapters_of_its_base_held_as_it_holds_it(
    name: QuantizationName, usual: native.NativeDriver, bases_dir: Path, storage: Storage, tmp_path: Path
) -> None:
    trained_on = load(bases_dir, name)
    model = make.peft_model(trained_on, rank=4, seed=1)
    ref = make.publish(storage, trained_on, model, tmp_path / "adapter")
    settings = InferenceSettings(base=rows.TINY)
    driver = native.open_driver(load(bases_dir, name), storage, cache_dir=tmp_path / "engine", settings=settings)
    try:
        assert driver.caps.quantization == name
        for prompt in make.PROMPTS:
            chunks = asyncio.run(make.answer(driver, make.request(prompt, ref)))
            told = make.greedy(model, prompt, trained_on.renderer.stop_ids, 24)
            assert make.text_of(chunks) == trained_on.renderer.decode(told)
    finally:
        driver.close()
    with pytest.raises(BadRequest, match=rf"other weights, {rows.TINY} in {name} \(.*, than {rows.TINY} in nf4 \(") as refusal:
        asyncio.run(make.answer(usual, make.request(ref=ref)))
    assert refusal.value.code == "adapter_refused"
    named = ref.model_copy(update={"base_digest": trained_on.entry.digest})
    with pytest.raises(Unavailable, match="in another way") as away:  # the gateway then asks the next engine
        asyncio.run(make.answer(usual, make.request(ref=named)))
    assert away.value.code == "base_not_loaded"


def engine(quantization: str, base: str = rows.TINY) -> Engine:
    return Engine(id=f"{base} in {quantization}", base=base, base_digest=quantization, quantization=quantization)


def test_a_request_goes_to_the_engines_that_hold_its_base() -> None:
    nf4, int8, other = engine("nf4"), engine("int8"), engine("int8", base="other")
    live = [int8, other, nf4]
    of_int8 = AdapterRef(id="a", digest="d", prefix="p", base=rows.TINY, base_digest="int8")
    of_before, of_none = (of_int8.model_copy(update={"base_digest": digest}) for digest in (None, "none"))

    assert engines.answering(live, rows.TINY, of_int8) == [int8]
    assert engines.answering(live, rows.TINY, of_none) == []
    assert engines.answering(live, rows.TINY, of_before) == [nf4]
    assert engines.answering([int8, other], rows.TINY, of_before) == []
    assert engines.answering(live, rows.TINY, None) == [nf4]
    assert engines.answering([int8, other], rows.TINY, None) == [int8]
