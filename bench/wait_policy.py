"""What spinning threads cost beside a busy process: bf16 products a second, by OpenMP wait policy (docs/decisions/0007).

    python bench/wait_policy.py [--quick] [--json FILE]

Each policy needs a process of its own, since OpenMP reads it once. Runs are interleaved; ratios are taken pair by pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

TARGET_RATIO = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three pairs of three seconds instead of seven of eight")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(_products_per_second(asked.measure))
        return
    pairs, seconds = (3, 3.0) if asked.quick else (7, 8.0)
    measured = [(_beside_a_busy_process(None, seconds), _beside_a_busy_process("PASSIVE", seconds)) for _ in range(pairs)]
    print(f"{'spinning':>10} {'sleeping':>10} {'ratio':>7}   products a second on {os.cpu_count()} cores, one of them busy")
    for spinning, sleeping in measured:
        print(f"{spinning:10.0f} {sleeping:10.0f} {sleeping / spinning:7.2f}")
    ratio = statistics.median(sleeping / spinning for spinning, sleeping in measured)
    is_met = ratio >= TARGET_RATIO
    target = {"name": "sleeping over spinning, median of ratios", "value": ratio, "target": TARGET_RATIO, "ok": is_met}
    print(f"median ratio {ratio:.2f}, target {TARGET_RATIO}: {'met' if is_met else 'missed'}")
    if asked.json:
        asked.json.write_text(json.dumps({"targets": [target]}, indent=2) + "\n")


def _beside_a_busy_process(policy: str | None, seconds: float) -> float:
    """With OpenMP's own default, which spins, where no policy is given."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        command = [sys.executable, __file__, "--measure", str(seconds)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        busy.kill()
        busy.wait()
    return float(done.stdout)


def _products_per_second(seconds: float) -> float:
    """Products of the shapes of SmolLM2's MLP with 512 rows, each followed by work on elements, on all cores."""
    rows_TD, weight_DF = torch.randn(512, 576, dtype=torch.bfloat16), torch.randn(576, 1536, dtype=torch.bfloat16)
    bias_TF = torch.randn(512, 1536)
    torch.set_num_threads(os.cpu_count() or 1)
    count, started_at = 0, time.perf_counter()
    while time.perf_counter() - started_at < seconds:
        for _ in range(10):
            _ = (rows_TD @ weight_DF).float() + bias_TF * 2
        count += 10
    return count / (time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
