"""Both passes over training files (docs/data.md): how fast, in how much memory.

    python bench/data.py [--quick] [--json FILE] [--rounds N] [--megabytes N] [--cache-dir DIR]

First the examiner's, in megabytes a second of one core; then those of bench/second_pass.py. Each run is a fresh process, started
as a worker starts it, limits included. Speed is that of its processor time without its start; memory is all that was resident
at once. Rows are chats of about 1 and 10 kB: a third plain, a third with characters
beyond ASCII, a third with markup, and in every second row all of that escaped. The largest file shows that memory does not
grow with it.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worker.examiner import MEMORY_BYTES

SEED, SECONDS = 1, 3600
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "nobody", "looks", "and", "then", "rests"]
WIDE = ["Größe", "über", "日本", "наконец", "🙂", "naïve"]
MARKUP = ["<b>", "</p>", "a[0]", "if a < b:\n\t"]
ROW_BYTES = (1_000, 10_000)
LEAST_SPEED, MOST_RESIDENT = 50.0, 256 * 2**20


def main() -> None:
    asked = _arguments()
    rounds, megabytes = (1, 32) if asked.quick else (asked.rounds, asked.megabytes)
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = _examined(_written(Path(folder) / "empty", 0, 1_000))["cpu_seconds"]
        cells = [(f"{size // 1000} kB rows, {megabytes} MB", size, megabytes) for size in ROW_BYTES]
        cells.append((f"1 kB rows, {4 * megabytes} MB", 1_000, 4 * megabytes))
        for name, size, length in cells:
            path = _written(Path(folder) / "rows.jsonl", length * 10**6, size)
            for _ in range(rounds):
                run = _examined(path)
                run["megabytes_per_second"] = path.stat().st_size / 1e6 / (run["cpu_seconds"] - started)
                runs.setdefault(name, []).append(run)
                print(f"{name:24} {run['megabytes_per_second']:6.1f} MB/s  {run['peak_rss_bytes'] / 2**20:6.1f} MiB", flush=True)
    import second_pass  # only now: a process's peak begins with that of the one which forked it

    second = second_pass.measure(
        rounds=min(rounds, 3), megabytes=max(4, megabytes // 8), pairs=400 if asked.quick else 4000, cache_dir=asked.cache_dir
    )
    targets = _targets(runs) + second[0]
    for target in targets:
        print(f"{target['name']:52} {target['value']:9.3g}   target {target['target']:g}: {'met' if target['ok'] else 'MISSED'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": targets, "runs": runs | second[1]}, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, 32 MB and 4 MB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--megabytes", type=int, default=128, metavar="N", help="size of the files; of the largest, four times that"
    )
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    return parser.parse_args()


def _examined(path: Path) -> dict[str, Any]:
    """One run of the process, fed from a file."""
    command = [sys.executable, "-m", "worker.examiner", str(SECONDS), str(MEMORY_BYTES)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    began_at = time.perf_counter()
    with path.open("rb") as file:
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        report = json.loads(process.stdout.read() or "null")
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or report is None or report["warning_count"] or (report["rows"] and report["problem_count"]):
        raise SystemExit(f"the examiner failed with status {process.returncode}: {report}")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": time.perf_counter() - began_at,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "rows": report["rows"],
    }


def _written(path: Path, size_bytes: int, row_bytes: int) -> Path:
    with path.open("wb") as file:
        for row in _rows(row_bytes):
            if file.tell() >= size_bytes:
                return path
            file.write(row)
    raise AssertionError("rows have no end")


def _rows(row_bytes: int) -> Iterator[bytes]:
    rng = random.Random(SEED)
    while True:
        words, escapes = rng.choice((WORDS, WORDS + WIDE, WORDS + MARKUP)), rng.random() < 0.5
        messages = [{"role": "system", "content": "You are brief."}]
        while len(json.dumps(messages, ensure_ascii=False).encode()) < row_bytes - 300:
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": " ".join(rng.choices(words, k=rng.randint(10, 40)))})
        yield json.dumps({"messages": messages}, ensure_ascii=escapes).encode() + b"\n"


def _targets(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    targets = []
    for name, made in runs.items():
        speed = statistics.median(run["megabytes_per_second"] for run in made)
        resident = max(run["peak_rss_bytes"] for run in made) / 2**20
        targets.append({"name": f"{name}: MB/s", "value": speed, "target": LEAST_SPEED, "ok": speed >= LEAST_SPEED})
        most = MOST_RESIDENT / 2**20
        targets.append({"name": f"{name}: peak RSS, MiB", "value": resident, "target": most, "ok": resident <= most})
    return targets


if __name__ == "__main__":
    main()
