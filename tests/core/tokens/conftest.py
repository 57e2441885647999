from pathlib import Path

import pytest

from app.core import catalog
from app.core.render import Renderer
from tests.make import TINY
from worker.model import card


@pytest.fixture(scope="session")
def tiny(bases_dir: Path) -> Renderer:
    """The tiny base's tokenizer and template."""
    return Renderer.open(card.prepared(catalog.load()[TINY], bases_dir))
