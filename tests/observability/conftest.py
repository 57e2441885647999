"""One stack for every test of this folder, with a collector beside it, and a job that it has trained."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.observability.collector import Collector, collecting
from tests.stack import Stack, running_stack


@dataclass(frozen=True)
class Observed:
    """The stack, and where its processes tell their metrics."""

    stack: Stack
    collector: Collector

    @property
    def state(self) -> dict[str, str]:
        state: dict[str, str] = json.loads((self.stack.data_dir / "stack.json").read_text())
        return state

    def metrics_of(self, process: str) -> str:
        """As Prometheus reads them."""
        url = self.url_of(process)
        answer = httpx.get(
            url, headers={"Authorization": f"Bearer {self.state['metrics_token']}"}, verify=False, timeout=PATIENCE_SECONDS
        )
        assert answer.status_code == 200, f"{url}: {answer.text}"
        return answer.text

    def url_of(self, process: str) -> str:
        if process == "api":
            return f"{self.stack.base_url.removesuffix('/v1')}/metrics"
        if process == "engine":
            return f"{self._engine_url}/metrics"
        return f"http://127.0.0.1:{json.loads((self.stack.data_dir / 'stack.json').read_text())['ports'][process]}/metrics"

    @property
    def _engine_url(self) -> str:
        log = (self.stack.data_dir / "logs" / "engine.log").read_text()
        url: str = next(json.loads(line)["url"] for line in log.splitlines() if '"engine_listening"' in line)
        return url


PROCESSES = ("api", "relay", "cpu", "train", "engine")


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Observed]:
    with collecting() as collector:
        traced = {"TUNESMITH_TRACING__ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}  # milliseconds
        with running_stack(tmp_path_factory.mktemp("observed"), bases_dir, environment={**os.environ, **traced}) as running:
            yield Observed(running, collector)


@pytest.fixture(scope="session")
def user(observed: Observed) -> Iterator[OpenAI]:
    with OpenAI(base_url=observed.stack.base_url, api_key=observed.stack.api_key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def trained(user: OpenAI) -> FineTuningJob:
    """A job that has succeeded, and whose model has answered once."""
    file = user.files.create(file=("train.jsonl", make.chat_file(12)), purpose="fine-tune")
    job = user.fine_tuning.jobs.create(model=make.TINY, training_file=file.id, hyperparameters={"n_epochs": 1})

    def is_over() -> bool:
        return user.fine_tuning.jobs.retrieve(job.id).status in {"succeeded", "failed", "cancelled"}

    eventually(is_over)
    job = user.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    said = user.chat.completions.create(
        model=str(job.fine_tuned_model), messages=[{"role": "user", "content": "What comes after 3?"}], max_tokens=8
    )
    assert said.usage
    return job
