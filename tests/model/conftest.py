"""The tiny base, loaded once; whoever changes it loads a copy of its own."""

from pathlib import Path

import pytest

from app.core import catalog
from tests import make
from worker.model import base as bases
from worker.model.base import LoadedBase


@pytest.fixture(scope="session")
def tiny(bases_dir: Path) -> LoadedBase:
    return bases.load(catalog.load()[make.TINY], bases_dir, device="cpu", for_training=True)
