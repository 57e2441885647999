"""Train a real base while the trainer, its worker and the whole machine are killed, and compare the bits that come out.

    python -m bench.chaos.real [--base NAME] [--kills N] [--quick] [--json FILE]

`tunesmith up` trains one job undisturbed, then the same job again: same files, seed and settings, with dropout and evaluations.
At steps drawn by a seed, one in each of N equal parts of it, the second one's trainer gets SIGKILL, or the train worker (whose
trainer must die with it), or every process there is, Postgres and S3 among them, as in a power cut; then `tunesmith up` is
started again on what lies on the disk. Leases are of 6 seconds, else a dead worker's job would lie still for a minute.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from bench.chaos.house import ROOT, Stuck, adapter_sha256, eventually
from bench.chaos.machine import GONE_SECONDS, TINY, Machine, is_alive, machine

ORDERS, BATCH_SIZE = ROOT / "cli" / "orders", 4
STEP_SECONDS, JOB_SECONDS = 900.0, 3600.0
LONGEST_WAIT_SECONDS = 2.0  # after the drawn step is told, so that evaluations and uploads are struck as well
BEGUN = re.compile(r"Training (?:started|resumed at step (\d+))")
SAVED = re.compile(r"Checkpoint saved at step (\d+)")


@dataclass(frozen=True)
class Plan:
    """What is trained: rows of the demo's file, with a checkpoint `every` so many steps."""

    base: str
    rows: int
    n_epochs: int
    every: int

    @property
    def steps(self) -> int:
        return self.n_epochs * self.rows // BATCH_SIZE


@dataclass(frozen=True)
class Kill:
    """`seconds` passed until the customer was told of a step again."""

    victim: str
    drawn_step: int
    seconds: float


@dataclass(frozen=True)
class Resume:
    """Where an attempt went on, beside the last step that was told before it, and the newest checkpoint that there was."""

    told_step: int
    saved_step: int
    resumed_step: int

    @property
    def repeated(self) -> int:
        return self.told_step - self.resumed_step

    def repeated_beside_upload(self, every: int) -> int:
        """Without the steps that were made while the checkpoint of the newest interval was still on its way to storage."""
        due_step = self.told_step // every * every
        return (self.told_step if self.saved_step >= due_step else due_step) - self.resumed_step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct", metavar="NAME", help="of the catalog (%(default)s)")
    parser.add_argument("--kills", type=int, default=6, metavar="N", help="in all, of each kind about as many (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"three kills, with the base {TINY}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".tunesmith" / "chaos-real", metavar="DIR", help="emptied first")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tunesmith", metavar="DIR")
    asked = parser.parse_args(arguments)
    base, kills = (TINY, 3) if asked.quick else (asked.base, asked.kills)
    plan = Plan(base, rows=320, n_epochs=4, every=32) if base == TINY else Plan(base, rows=160, n_epochs=1, every=4)
    with machine(asked.data_dir, base=base, cache_dir=asked.cache_dir) as at:
        told = _compared(at, plan, kills=kills, seed=asked.seed)
    _show(told)
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if all(target["ok"] for target in told["targets"]) else 1


def _compared(at: Machine, plan: Plan, *, kills: int, seed: int) -> dict[str, Any]:
    begun_at = time.monotonic()
    files = [_upload(at, name, rows) for name, rows in (("train.jsonl", plan.rows), ("heldout.jsonl", 16))]
    undisturbed = _ended(at, _begin(at, plan, files))
    print(f"undisturbed: {plan.steps} steps in {time.monotonic() - begun_at:.0f} s", flush=True)
    job = _begin(at, plan, files)
    killed = list(_strike(at, job, plan, kills=kills, rng=random.Random(seed)))
    struck = _ended(at, job)
    both, resumes = (undisturbed, struck), list(_resumes(at, struck))
    bits, curves = [adapter_sha256(at.storage(), one) for one in both], [_curve(at, one) for one in both]
    return {
        "targets": _targets(plan, bits, curves, resumes),
        "plan": asdict(plan) | {"steps": plan.steps},
        "kills": [asdict(kill) for kill in killed],
        "resumes": [asdict(resume) | {"repeated": resume.repeated} for resume in resumes],
        "attempts": (struck.model_extra or {})["attempt"],
        "sha256": bits,
        "seconds": time.monotonic() - begun_at,
    }


def _targets(plan: Plan, bits: Sequence[str], curves: Sequence[Sequence[str]], resumes: Sequence[Resume]) -> list[dict[str, Any]]:
    repeated = max((one.repeated_beside_upload(plan.every) for one in resumes), default=0)
    found = {
        "final adapters that are not bit-identical": (int(bits[0] != bits[1]), 0),
        "rows of metrics.csv that differ": (sum(one != other for one, other in zip_longest(*curves)), 0),
        "resumes from another than the newest checkpoint": (sum(one.saved_step != one.resumed_step for one in resumes), 0),
        "steps computed again by a kill, at most": (repeated, plan.every),
    }
    return [{"name": name, "value": value, "target": most, "ok": value <= most} for name, (value, most) in found.items()]


def _upload(at: Machine, name: str, rows: int) -> str:
    lines = (ORDERS / name).read_bytes().splitlines()[:rows]
    return at.client.files.create(file=(name, b"\n".join(lines)), purpose="fine-tune").id


def _begin(at: Machine, plan: Plan, files: Sequence[str]) -> str:
    return at.client.fine_tuning.jobs.create(
        model=plan.base,
        training_file=files[0],
        validation_file=files[1],
        seed=7,
        hyperparameters={"n_epochs": plan.n_epochs, "batch_size": BATCH_SIZE},
        extra_body={"adapter": {"dropout": 0.05}, "training": {"checkpoint_every_steps": plan.every}},
    ).id


def _ended(at: Machine, job: str) -> FineTuningJob:
    def found() -> FineTuningJob | None:
        now = at.client.fine_tuning.jobs.retrieve(job)
        return now if now.status in {"succeeded", "failed", "cancelled"} else None

    ended = eventually(found, f"{job} ends", seconds=JOB_SECONDS, pause_seconds=0.5)
    assert ended is not None
    if ended.status != "succeeded":
        raise Stuck(f"{job} {ended.status}: {ended.error}")
    return ended


def _strike(at: Machine, job: str, plan: Plan, *, kills: int, rng: random.Random) -> Iterator[Kill]:
    victims = [list(VICTIMS)[number % len(VICTIMS)] for number in range(kills)]
    rng.shuffle(victims)
    for number, victim in enumerate(victims):
        step = rng.randrange(number * plan.steps // kills, (number + 1) * plan.steps // kills) or 1
        eventually(lambda step=step: _newest_step(at, job) >= step, f"step {step}", seconds=STEP_SECONDS)  # type: ignore[misc]
        time.sleep(rng.uniform(0, LONGEST_WAIT_SECONDS) if plan.base != TINY else 0)
        last = _sequence(_events(at, job)[-1])
        killed_at = time.monotonic()
        VICTIMS[victim](at)
        eventually(lambda last=last: _goes_on(at, job, last), "a step after the kill", seconds=STEP_SECONDS)  # type: ignore[misc]
        yield (kill := Kill(victim, step, time.monotonic() - killed_at))
        print(f"{victim:8} killed at step {step:4}, told of the next one after {kill.seconds:5.1f} s", flush=True)


def _kill_trainer(at: Machine) -> None:
    for trainer in at.running("worker.trainer"):
        trainer.kill()


def _kill_worker(at: Machine) -> None:
    trainers = at.running("worker.trainer")
    for worker in at.running("worker.train"):
        worker.kill()
    eventually(lambda: not any(map(is_alive, trainers)), "its trainer dies with its worker", seconds=GONE_SECONDS)


def _kill_all(at: Machine) -> None:
    at.cut_power()
    at.start()


VICTIMS: dict[str, Callable[[Machine], None]] = {"trainer": _kill_trainer, "worker": _kill_worker, "machine": _kill_all}


def _events(at: Machine, job: str) -> list[FineTuningJobEvent]:
    return list(at.client.fine_tuning.jobs.list_events(job, limit=100))[::-1]


def _sequence(event: FineTuningJobEvent) -> int:
    return int((event.model_extra or {})["sequence"])


def _step(event: FineTuningJobEvent) -> int | None:
    data: Any = event.data or {}
    return int(data["step"]) if "train_loss" in data else None


def _newest_step(at: Machine, job: str) -> int:
    newest = at.client.fine_tuning.jobs.list_events(job, limit=20).data
    if any(event.message.startswith("The job has successfully completed") for event in newest):
        raise Stuck("the job was over before all kills were done: ask for fewer")
    return next((step for event in newest if (step := _step(event)) is not None), 0)


def _goes_on(at: Machine, job: str, last: int) -> bool:
    """Whether an attempt that began after the event numbered `last` has told of a step."""
    has_begun = False
    for event in _events(at, job):
        if _sequence(event) > last:
            has_begun = has_begun or BEGUN.match(event.message) is not None
            if has_begun and _step(event) is not None:
                return True
    return False


def _resumes(at: Machine, job: FineTuningJob) -> Iterator[Resume]:
    told = saved = 0
    for event in _events(at, job.id):
        if found := SAVED.match(event.message):
            saved = int(found[1])
        elif begun := BEGUN.match(event.message):
            resumed = int(begun[1] or 0)
            if told:
                yield Resume(told, saved, resumed)
            told = resumed
        else:
            told = _step(event) or told


def _curve(at: Machine, job: FineTuningJob) -> list[str]:
    return at.client.files.content(job.result_files[0]).text.splitlines()


def _show(told: dict[str, Any]) -> None:
    plan, columns = told["plan"], ("told of step", "saved", "went on at", "computed again", "seconds to the next step")
    print(
        f"\n{told['attempts']} attempts, {told['seconds']:.0f} s; a checkpoint every {plan['every']} of {plan['steps']} steps\n"
    )
    print(f"{'killed':8}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    for kill, resume in zip(told["kills"], told["resumes"], strict=False):
        values = (*(resume[name] for name in ("told_step", "saved_step", "resumed_step", "repeated")), round(kill["seconds"], 1))
        print(f"{kill['victim']:8}" + "".join(f"{value:{len(name) + 3}}" for name, value in zip(columns, values, strict=True)))
    print(f"\nsha256 undisturbed {told['sha256'][0]}\nsha256 killed      {told['sha256'][1]}\n")
    for target in told["targets"]:
        print(f"{'met   ' if target['ok'] else 'MISSED'} {target['name']}: {target['value']} (target {target['target']})")


if __name__ == "__main__":
    sys.exit(main())
