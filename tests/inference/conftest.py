"""A tiny base in fp32, adapters trained by nobody but written as training writes them, and drivers over both."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from app.core import catalog
from app.core.engine import AdapterRef
from app.core.settings import InferenceSettings
from app.core.storage import Storage
from tests import make as rows
from tests.inference import make
from worker.inference import native
from worker.inference.native import NativeDriver
from worker.model import base as bases
from worker.model.base import LoadedBase

OpenDriver = Callable[..., NativeDriver]


@pytest.fixture(scope="session")
def load_tiny(bases_dir: Path) -> Callable[[], LoadedBase]:
    """A fresh copy at each call: a driver owns its base. In fp32, where equal mathematics gives equal tokens."""
    return lambda: bases.load(catalog.load()[rows.TINY], bases_dir, dtype=torch.float32, device="cpu", for_training=False)


@pytest.fixture(scope="session")
def oracle(load_tiny: Callable[[], LoadedBase]) -> LoadedBase:
    """The base that no engine touches."""
    return load_tiny()


@pytest.fixture(scope="session")
def trained(load_tiny: Callable[[], LoadedBase]) -> dict[str, PeftModel]:
    """PEFT's own models of three adapters of different rank, one of which leaves most modules alone."""
    return {
        "first": make.peft_model(load_tiny(), rank=4, seed=1),
        "second": make.peft_model(load_tiny(), rank=8, seed=2),
        "third": make.peft_model(load_tiny(), rank=16, seed=3, targets=("q_proj", "down_proj")),
    }


@pytest.fixture(scope="session")
def published(
    trained: dict[str, PeftModel], oracle: LoadedBase, storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterRef]:
    """The same adapters in object storage."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make.publish(storage, oracle, model, folder / name) for name, model in trained.items()}


@pytest.fixture
def open_driver(load_tiny: Callable[[], LoadedBase], storage: Storage, tmp_path: Path) -> Iterator[OpenDriver]:
    """Opens drivers with these settings changed, and closes them."""
    opened = list[NativeDriver]()

    def open_one(**changes: object) -> NativeDriver:
        settings = InferenceSettings(base=rows.TINY).model_copy(update=changes)
        opened.append(native.open_driver(load_tiny(), storage, cache_dir=tmp_path, settings=settings))
        return opened[-1]

    yield open_one
    for driver in opened:
        driver.close()
