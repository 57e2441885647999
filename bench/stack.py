"""A whole stack for a benchmark: `tunesmith up` in a folder of its own, and its customer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

PATIENCE_SECONDS = 300.0
ROOT = Path(__file__).parents[1]


@contextmanager
def stack(folder: Path, base: str, cache_dir: Path) -> Iterator[OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = {"INFERENCE__BASE": base, "TRAINING__WARM_BASE": base, "CACHE_DIR": str(cache_dir)}
    environment = os.environ | {f"TUNESMITH_{name}": value for name, value in chosen.items()}
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(folder / "data"), "--port", str(port)]
    with (folder / "console").open("w") as console:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
        try:
            wait((folder / "data" / "credentials.json").exists)
            with OpenAI(**json.loads((folder / "data" / "credentials.json").read_text())) as client:
                yield client
        finally:
            running.send_signal(signal.SIGINT)
            running.wait()


def wait(is_so: Callable[[], bool], *, pause_seconds: float = 0.05) -> None:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > give_up_at:
            raise SystemExit("the stack did not get that far")
        time.sleep(pause_seconds)
