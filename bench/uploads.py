"""How much memory the API takes while a file comes in parts, and how fast that is (docs/uploads.md).

    PYTHONPATH=. python bench/uploads.py [--quick] [--json FILE] [--at-once N]

Postgres, Valkey, S3 and one API process are started. The SDK sends parts of 64 MiB, several at once and the last ones first,
completes the upload with the file's md5, and reads the file back. The API's memory is looked at every 20 ms; what it has
taken when a small upload is through, which loads what is loaded once, is where growth is counted from.
"""

import argparse
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from api import api
from openai import OpenAI

from app.core.settings import MIB

MOST_GROWTH_MIB = 64.0
PART_BYTES = 64 * MIB
PAUSE_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 MB instead of 2 GB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="parts under way")
    asked = parser.parse_args()
    size_bytes = (256 if asked.quick else 2048) * MIB
    with (
        tempfile.TemporaryDirectory() as folder,
        api(Path(folder) / "data") as at,
        OpenAI(base_url=f"{at.url}/v1", api_key=at.key) as client,
    ):
        path = Path(folder) / "file"
        _send(client, _write(path, MIB), at_once=1)
        _write(path, size_bytes)
        memory = _Memory(at.process())
        with memory.watched():
            steps = _send(client, path, at_once=asked.at_once)
    for step, seconds in steps.items():
        print(f"{step:12} {seconds:7.1f} s   {size_bytes / 1e6 / seconds:7.1f} MB/s")
    print(f"the API's memory: {memory.before_bytes / MIB:.0f} MiB before, {memory.peak_bytes / MIB:.0f} MiB at most")
    growth = memory.growth_mib
    target = {
        "name": "growth of the API's memory in MiB",
        "value": growth,
        "target": MOST_GROWTH_MIB,
        "ok": growth <= MOST_GROWTH_MIB,
    }
    print(f"{target['name']:36} {growth:6.1f}   target {MOST_GROWTH_MIB:.0f}: {'met' if target['ok'] else 'MISSED'}")
    if asked.json:
        figures = {"bytes": size_bytes, "at_once": asked.at_once, "seconds": steps}
        asked.json.write_text(json.dumps({"targets": [target], **figures}, indent=2) + "\n")


def _write(path: Path, size_bytes: int) -> Path:
    """Random, so that no part is another's twin: those are stored once."""
    with path.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(os.urandom(MIB))
    return path


def _send(client: OpenAI, path: Path, *, at_once: int) -> dict[str, float]:
    """Seconds of each step. Raises SystemExit if other bytes come back."""
    steps: dict[str, float] = {}
    upload = client.uploads.create(bytes=path.stat().st_size, filename="file", mime_type="text/jsonl", purpose="fine-tune")

    def send(offset: int) -> str:
        with path.open("rb") as file:
            file.seek(offset)
            return client.uploads.parts.create(upload.id, data=file.read(PART_BYTES)).id

    offsets = range(0, upload.bytes, PART_BYTES)
    with _timed(steps, "parts"), ThreadPoolExecutor(at_once) as threads:
        part_ids = list(threads.map(send, reversed(offsets)))[::-1]
    md5 = _digest(hashlib.md5, path.open("rb").read, MIB)
    with _timed(steps, "completing"):
        completed = client.uploads.complete(upload.id, part_ids=part_ids, md5=md5)
    assert completed.file is not None
    with _timed(steps, "reading back"), client.files.with_streaming_response.content(completed.file.id) as answer:
        chunks = answer.iter_bytes(MIB)
        came = _digest(hashlib.sha256, lambda _: next(chunks, b""), MIB)
    if came != _digest(hashlib.sha256, path.open("rb").read, MIB):
        raise SystemExit("other bytes came back than were sent")
    return steps


def _digest(kind: Callable[[], Any], read: Callable[[int], bytes], size_bytes: int) -> str:
    digest = kind()
    while chunk := read(size_bytes):
        digest.update(chunk)
    return str(digest.hexdigest())


@contextmanager
def _timed(steps: dict[str, float], name: str) -> Iterator[None]:
    began_at = time.monotonic()
    yield
    steps[name] = time.monotonic() - began_at


class _Memory:
    """What a process has of it, looked at while a block runs."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.before_bytes = self.peak_bytes = self._now()

    @property
    def growth_mib(self) -> float:
        return (self.peak_bytes - self.before_bytes) / MIB

    @contextmanager
    def watched(self) -> Iterator[None]:
        is_over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(is_over,))
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(PAUSE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        return int(self._process.memory_info().rss)


if __name__ == "__main__":
    main()
