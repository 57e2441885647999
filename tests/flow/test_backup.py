"""A stack is backed up while a job trains in it, and comes back elsewhere with all that it had; the job goes on there.

The second stack lives with a wall clock that jumps, which it must not notice.
"""

import subprocess
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests import make
from tests.clock import Clock
from tests.embedded.patience import PATIENCE_SECONDS
from tests.flow.test_survival import begin, losses, messages, wait_for_checkpoint, wait_for_end, wait_until
from tests.stack import COMMAND, Stack, running_stack

pytestmark = pytest.mark.timeout(900)

EPOCHS = 16  # of 16 steps: it is backed up, and the second stack's clock has jumped, long before it is over
HOUR_SECONDS = 3600
HOOK = "http://127.0.0.1:9/hooks"


def tunesmith(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)


def answer(client: OpenAI, model: str) -> str:
    asked = [{"role": "user", "content": "What comes after 3?"}]
    said = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=12)  # type: ignore[arg-type]
    return str(said.choices[0].message.content)


def test_a_stack_comes_back_elsewhere_with_all_it_had(stack: Stack, client: OpenAI, tmp_path: Path, bases_dir: Path) -> None:
    trained, hook = begin(client, epochs=1), client.webhooks.create(name="a", url=HOOK, event_types=["fine_tuning.job.failed"])
    trained = wait_for_end(client, trained)
    assert trained.fine_tuned_model
    known = [answer(client, model) for model in (make.TINY, trained.fine_tuned_model)]
    running = begin(client, epochs=EPOCHS)
    wait_for_checkpoint(client, running)
    made = tunesmith("backup", tmp_path / "backup", "--data-dir", stack.data_dir)
    assert made.returncode == 0, made.stderr
    client.fine_tuning.jobs.cancel(running.id)  # the backup does not know of it
    restored = tunesmith("restore", tmp_path / "backup", "--data-dir", tmp_path / "data")
    assert restored.returncode == 0, restored.stderr

    clock = Clock(tmp_path)
    with running_stack(tmp_path / "data", bases_dir, environment=clock.environment) as again, _client_of(again) as elsewhere:
        for seconds in (HOUR_SECONDS, -HOUR_SECONDS):
            clock.jump(seconds)
            step = _step(elsewhere, running)
            wait_until(lambda step=step: _step(elsewhere, running) > step)  # type: ignore[misc]
        assert elsewhere.fine_tuning.jobs.retrieve(running.id).status == "running"
        assert again.api_key == stack.api_key
        assert elsewhere.files.content(trained.training_file).content == make.chat_file(64)
        assert [answer(elsewhere, model) for model in (make.TINY, trained.fine_tuned_model)] == known
        assert hook.id in [endpoint.id for endpoint in elsewhere.webhooks.list()]
        assert losses(elsewhere, trained) == losses(client, trained)
        ended = wait_for_end(elsewhere, running)
        told = messages(elsewhere, ended)
        assert ended.status == "succeeded", told
        assert losses(elsewhere, ended).keys() == {str(step) for step in range(1, 16 * EPOCHS + 1)}
    assert [sum(word in message for message in told) for word in ("fallen silent", "resumed")] == [1, 1], told


def _client_of(stack: Stack) -> OpenAI:
    return OpenAI(base_url=stack.base_url, api_key=stack.api_key)


def _step(client: OpenAI, job: FineTuningJob) -> int:
    """How far its last checkpoint is. Lists are in the order of ids, and those in that of the wall clock."""
    return max(checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=100))
