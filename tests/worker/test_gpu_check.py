"""The walk over a rented card, on a CPU with the tiny base: every row that needs no GPU passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.make import TINY, UNHURRIED

COMMAND = [sys.executable, "-m", "worker.gpu_check", "--base", TINY, "--epochs", "1"]


def run(bases_dir: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    given = os.environ | {"TUNESMITH_CACHE_DIR": str(bases_dir), "CUDA_VISIBLE_DEVICES": "", **UNHURRIED}
    return subprocess.run([*COMMAND, *options], env=given, capture_output=True, text=True, check=False)


def test_every_row_that_needs_no_gpu_passes_on_a_cpu(bases_dir: Path, tmp_path: Path) -> None:
    done = run(bases_dir, "--device", "cpu", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}

    skipped = {"card", "memory-limit"}
    assert {name: row["result"] for name, row in rows.items()} == {name: "skip" if name in skipped else "pass" for name in rows}
    assert {"template chatml", "nf4", "load", "train", "resume", "serve"} | skipped == rows.keys()
    assert rows["resume"]["numbers"]["relative_difference"] == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [name.split()[0] for name in rows]


def test_without_a_gpu_it_says_so(bases_dir: Path) -> None:
    done = run(bases_dir)

    assert done.returncode == 2
    assert "--device cpu" in done.stderr
