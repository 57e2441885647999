"""From a job to the start of its first forward, with a trainer that waited for it and with one that did not.

    python bench/warm_start.py [--quick] [--json FILE] [--cache-dir DIR]

The trainer is the process that a worker starts, spoken to as its supervisor does; the data set is tokenised already. Cold and
warm starts are interleaved. Memory is what a trainer holds while it waits. Results: docs/performance.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from app.core import catalog, events
from app.core.chat import Chat, Message
from app.core.render import Renderer
from app.core.spec import OptimizerSpec, TrainSpec
from app.core.tokens.tokenise import tokenise
from worker import wire
from worker.model import base as bases
from worker.model import card
from worker.trainers import LARGE_PAGES

BASE, TARGET_SECONDS = "smollm2-135m-instruct", 1.5
Trainer = subprocess.Popen[bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two starts of each kind instead of five")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    cold, warm, memory = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), asked.cache_dir)
        _started(job, asked.cache_dir, is_warm=True)  # what is made once on a machine is not measured
        for _ in range(2 if asked.quick else 5):
            cold.append(_started(job, asked.cache_dir, is_warm=False))
            warm.append(_started(job, asked.cache_dir, is_warm=True))
            memory.append(warm[-1][2])
    for kind, runs in (("cold", cold), ("warm", warm)):
        first, step = (statistics.median(run[part] for run in runs) for part in (0, 1))
        print(f"{kind}: {first:6.2f} s to the first forward, {step:6.2f} s to the end of the first step")
    print(f"a waiting trainer holds {statistics.median(memory) / 1e9:.2f} GB")
    seconds = statistics.median(run[0] for run in warm)
    target = {"name": "job to first forward, warm", "value": seconds, "target": TARGET_SECONDS, "ok": seconds <= TARGET_SECONDS}
    print(f"warm {seconds:.2f} s, target {TARGET_SECONDS}: {'met' if target['ok'] else 'missed'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": [target], "cold": cold, "warm": warm}, indent=2) + "\n")


def _job(folder: Path, cache_dir: Path) -> wire.TrainerJob:
    base = catalog.load().resolve(BASE)
    bases.prepare(base, cache_dir)
    renderer = Renderer.open(card.prepared(base, cache_dir))
    lines = (Path(__file__).parents[1] / "cli" / "orders" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    chats = (Chat(tuple(Message(m["role"], m["content"]) for m in row), line) for line, row in enumerate(rows, 1))
    tokenise(chats, renderer, max_seq_length=1024).write(folder / "training.safetensors")
    spec = TrainSpec(
        base=BASE,
        n_epochs=1,
        batch_size=16,
        seed=1,
        max_seq_length=1024,
        micro_batch_tokens=2048,
        checkpoint_every_steps=1000,
        optimizer=OptimizerSpec(learning_rate=1e-4),
    )
    return wire.TrainerJob(
        spec=spec,
        base=base,
        dataset=folder / "training.safetensors",
        output_dir=folder / "adapter",
        checkpoints_dir=folder / "checkpoints",
        handover_dir=folder / "handover",
        micro_batch_tokens=spec.micro_batch_tokens,
    )


def _started(job: wire.TrainerJob, cache_dir: Path, *, is_warm: bool) -> tuple[float, float, int]:
    """Seconds to the first forward and to the end of the first step, counted from the job (warm) or from the process (cold);
    and the bytes that it held before."""
    began_at = time.monotonic()
    with _trainer(cache_dir, *(("--warm", job.base.id) if is_warm else ())) as process:
        assert process.stdin is not None and process.stdout is not None
        held = psutil.Process(process.pid).memory_info().rss
        if is_warm:
            began_at = time.monotonic()
        process.stdin.write(job.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        first = 0.0
        for event in map(events.parse, process.stdout):
            if isinstance(event, events.Started):
                first = time.monotonic() - began_at
            if isinstance(event, events.Stepped):
                return first, time.monotonic() - began_at, held
    raise SystemExit("the trainer ended before its first step; its words are above")


@contextmanager
def _trainer(cache_dir: Path, *more: str) -> Iterator[Trainer]:
    command = [sys.executable, "-m", "worker.trainer", "--cache-dir", str(cache_dir), *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=LARGE_PAGES | os.environ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != wire.READY:
            raise SystemExit("the trainer did not get ready; its words are above")
        yield process
        process.kill()


if __name__ == "__main__":
    main()
