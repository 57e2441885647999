"""How soon a pause, a resume and a cancel take hold, as the customer sees it (target: 10 seconds on a CPU).

    python bench/stop_latency.py [--quick] [--json FILE] [--cache-dir DIR]

A whole stack (`tunesmith up`) with one long job that spends half of its time in evaluations. It is paused at moments drawn at
random, resumed when it is paused, and cancelled at the end; each is timed from the request to the status that it asks for.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openai import OpenAI
from stack import ROOT, stack, wait

TARGET_SECONDS = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny base, two pauses instead of six")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args()
    base, pauses = ("tiny-random-llama", 2) if asked.quick else ("smollm2-135m-instruct", 6)
    took: dict[str, list[float]] = {"pause": [], "resume": [], "cancel": []}
    with tempfile.TemporaryDirectory() as folder, stack(Path(folder), base, asked.cache_dir) as client:
        job, rng = _begin(client, base), random.Random(1)
        for number in range(pauses + 1):
            wait(lambda: _is_training(client, job))
            time.sleep(rng.uniform(0, 8))
            if number == pauses:
                took["cancel"].append(_timed(client.fine_tuning.jobs.cancel, job, lambda: _status(client, job) == "cancelled"))
                break
            took["pause"].append(_timed(client.fine_tuning.jobs.pause, job, lambda: _status(client, job) == "paused"))
            took["resume"].append(_timed(client.fine_tuning.jobs.resume, job, lambda: _status(client, job) == "running"))
    targets = [
        {"name": f"{word} takes hold, worst of {len(times)}", "value": max(times), "target": TARGET_SECONDS}
        for word, times in took.items()
    ]
    for target in targets:
        target["ok"] = target["value"] <= TARGET_SECONDS
        print(
            f"{target['name']:40} {target['value']:6.2f} s   target {TARGET_SECONDS:.0f}: {'met' if target['ok'] else 'MISSED'}"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"targets": targets, "seconds": took}, indent=2) + "\n")


def _begin(client: OpenAI, base: str) -> str:
    """A job that would take an hour: every second step is followed by an evaluation about as long."""
    rows = (ROOT / "cli" / "orders" / "train.jsonl").read_bytes().splitlines()
    files = [client.files.create(file=(f"{count}.jsonl", b"\n".join(rows[:count])), purpose="fine-tune") for count in (320, 64)]
    return client.fine_tuning.jobs.create(
        model=base,
        training_file=files[0].id,
        validation_file=files[1].id,
        hyperparameters={"n_epochs": 100, "batch_size": 16},
        extra_body={"training": {"checkpoint_every_steps": 2}},
    ).id


def _status(client: OpenAI, job: str) -> str:
    found = client.fine_tuning.jobs.retrieve(job)
    return "paused" if (found.model_extra or {})["paused"] else found.status


def _is_training(client: OpenAI, job: str) -> bool:
    """Whether it has taken a step since it was last claimed."""
    newest = client.fine_tuning.jobs.list_events(job, limit=1).data
    return _status(client, job) == "running" and bool(newest) and newest[0].type == "metrics"


def _timed(ask: Callable[[str], Any], job: str, has_taken_hold: Callable[[], bool]) -> float:
    began_at = time.monotonic()
    ask(job)
    wait(has_taken_hold)
    return time.monotonic() - began_at


if __name__ == "__main__":
    main()
