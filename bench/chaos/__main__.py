"""Kill, freeze, flush and cut off what `tunesmith up` runs while customers work with it, then ask whether anything is lost.

    make chaos CYCLES=1000        python -m bench.chaos [--cycles N] [--data-dir DIR] [--quick] [--json FILE]

A cycle is one fault: drawn by fixed weights and a seed, struck, recovered from. Beside it customers upload, train, halt, cancel
and chat through the SDK, and a receiver takes the webhooks. At the end all is let come to rest, and every invariant is asked of
Postgres, of storage, of the receiver's log and of what customers were told. A run that was stopped is gone on with: it keeps all
in its folder. Jobs have a trainer that computes next to nothing, and leases of 3 seconds; all traffic is on 127.0.0.1.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.chaos import faults, trial
from bench.chaos.checks import Checks
from bench.chaos.house import ROOT, House
from bench.chaos.ledger import Ledger

QUICK_CYCLES = 60
CHECKPOINT_STEPS = 5  # as bench.chaos.load asks for
CALM_SECONDS = (0.5, 2.5)  # between two faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--cycles", type=int, default=QUICK_CYCLES, metavar="N", help="faults in all (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CYCLES} cycles in a fresh folder")
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".tunesmith" / "chaos", metavar="DIR")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".tunesmith" / "test-cache", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=8)
    asked = parser.parse_args(arguments)
    cycles = QUICK_CYCLES if asked.quick else asked.cycles
    if asked.quick:
        shutil.rmtree(asked.data_dir, ignore_errors=True)
    strike = partial(strike_all, cycles=cycles, seed=asked.seed)
    outcome = trial.run(asked.data_dir, asked.cache_dir, seed=asked.seed, strike=strike)
    told = _told(outcome.ledger, outcome.checks, outcome.broken)
    _show(told)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if all(target["ok"] for target in told["targets"]) else 1


def strike_all(at: House, ledger: Ledger, *, cycles: int, seed: int) -> None:
    """Those that are left of the cycles, one after another. Raises Stuck if the service does not recover from one."""
    began_at, done = time.monotonic(), len(ledger.all("fault"))
    print(f"{max(0, cycles - done)} faults to come", flush=True)
    for number in range(done, cycles):
        rng = random.Random(f"{seed}/{number}")
        time.sleep(rng.uniform(*CALM_SECONDS))
        fault = faults.draw(rng)
        struck = fault.strike(at, rng)
        ledger.note("fault", number=number, **vars(struck))
        print(f"{number + 1:5} {struck.fault:24} whole again after {struck.service_seconds:5.1f} s", flush=True)
    print(f"struck for {time.monotonic() - began_at:.0f} s; letting all come to rest", flush=True)


def _told(ledger: Ledger, checks: Checks, broken: dict[str, list[str]]) -> dict[str, Any]:
    by_fault = defaultdict[str, list[dict[str, Any]]](list)
    for entry in ledger.all("fault"):
        by_fault[entry["fault"]].append(entry)
    lost = checks.lost_steps()
    targets = [{"name": name, "value": len(sentences), "target": 0, "ok": not sentences} for name, sentences in broken.items()]
    return {
        "targets": targets,
        "broken": {name: sentences[:20] for name, sentences in broken.items() if sentences},
        "faults": {
            name: {
                "count": len(entries),
                "service_seconds": _spread([entry["service_seconds"] for entry in entries]),
                "job_seconds": _spread([entry["job_seconds"] for entry in entries if entry["job_seconds"] is not None]),
            }
            for name, entries in sorted(by_fault.items())
        },
        "all_faults": {
            "count": sum(map(len, by_fault.values())),
            "service_seconds": _spread([entry["service_seconds"] for entries in by_fault.values() for entry in entries]),
            "job_seconds": _spread(
                [e["job_seconds"] for entries in by_fault.values() for e in entries if e["job_seconds"] is not None]
            ),
        },
        "customers": {
            kind: len(ledger.all(kind))
            for kind in ("file", "job", "cancelled", "followed", "chat", "webhook", "refused", "riddle")
        },
        "attempts": sum(job["attempt"] for job in checks.jobs.values()),
        "lost_steps": {"resumes": len(lost), "median": statistics.median(lost) if lost else 0, "most": max(lost, default=0)},
        "checkpoint_every_steps": CHECKPOINT_STEPS,
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {"p50": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "most": ordered[-1]}


def _show(told: dict[str, Any]) -> None:
    print(f"\n{'fault':26} {'times':>5}   {'service p50':>11} {'p95':>6}   {'jobs p50':>8} {'p95':>6}   seconds")
    for name, fault in {**told["faults"], "all": told["all_faults"]}.items():
        service, jobs = fault["service_seconds"], fault["job_seconds"]
        of_jobs = f"{jobs['p50']:8.1f} {jobs['p95']:6.1f}" if jobs else f"{'–':>8} {'–':>6}"
        print(f"{name:26} {fault['count']:5}   {service['p50']:11.1f} {service['p95']:6.1f}   {of_jobs}")
    lost = told["lost_steps"]
    print(f"\n{told['customers']}, {told['attempts']} attempts")
    print(
        f"work lost: {lost['resumes']} resumes, median {lost['median']:g} steps, most {lost['most']}; a checkpoint every "
        f"{told['checkpoint_every_steps']}\n"
    )
    for target in told["targets"]:
        print(
            f"{'held ' if target['ok'] else 'BROKEN'} {target['name']}" + ("" if target["ok"] else f": {target['value']} times")
        )
        for sentence in told["broken"].get(target["name"], ()):
            print(f"         {sentence}")


if __name__ == "__main__":
    sys.exit(main())
