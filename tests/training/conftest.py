"""The tiny base in the two precisions that tests need. Runs leave it as it was, so all tests share it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core import catalog
from tests.make import TINY
from tests.training.make import Runner
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training import fused
from worker.training.fused import Fused

_call_compiled = Fused.__call__


def _call_as_written(function: Fused[..., Any], *args: Any, **named: Any) -> Any:
    return function.as_written(*args, **named)


@pytest.fixture(scope="package", autouse=True)
def _kernels(bases_dir: Path) -> Iterator[None]:
    """What computes runs as it is written, but in tests that take `compiled`: compiling takes longer than all of them."""
    fused.keep_in(bases_dir)  # where trainers look for what is compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fused, "__call__", _call_as_written)
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fused, "__call__", _call_compiled)


@pytest.fixture(scope="session")
def tiny(bases_dir: Path) -> LoadedBase:
    return bases.load(catalog.load()[TINY], bases_dir, device="cpu", for_training=True)


@pytest.fixture(scope="session")
def exact(bases_dir: Path) -> LoadedBase:
    """The same weights, computed in fp32: equal mathematics gives nearly equal numbers."""
    return bases.load(catalog.load()[TINY], bases_dir, device="cpu", dtype=torch.float32, for_training=True)


@pytest.fixture
def runner(tiny: LoadedBase, tmp_path: Path) -> Runner:
    return Runner(tiny, tmp_path / "run")
