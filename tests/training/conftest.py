"""The tiny base in the two precisions that tests need. Runs leave it as it was, so all tests share it."""

from pathlib import Path

import pytest
import torch

from app.core import catalog
from tests.make import TINY
from tests.training.make import Runner
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training import fused


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny products: threads would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def _kernels(bases_dir: Path) -> None:
    fused.keep_in(bases_dir)  # where trainers look for them: compiling takes longer than most of these tests together


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
