"""One stack for every test of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.stack import Stack, running_stack

NO_TRACKER = {"TUNESMITH_MLFLOW__TRACKING_URI": "http://127.0.0.1:9"}  # which jobs may ask for, and which is away


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("up"), bases_dir, environment={**os.environ, **NO_TRACKER}) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=stack.base_url, api_key=stack.api_key) as made:
        yield made
