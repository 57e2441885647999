"""One stack for every test of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.stack import Stack, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("up"), bases_dir) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=stack.base_url, api_key=stack.api_key) as made:
        yield made
