"""A trainer that computes next to nothing, in the place of worker.trainer: same words, same directories, same way to die.

Its weights are a chain of digests: step n's follow from step n-1's, the data and the seed. So the last adapter of a run is the
same to the bit however often the run was broken off, or it was gone on from something that it should not have been.
"""

import hashlib
import os
import queue
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.core import checkpoints, manifest
from app.core.events import Checkpointed, Event, Finished, MeasuredMemory, Started, Stepped, Stopped
from app.core.manifest import BaseEntry, Manifest
from worker import child, wire

STEPS_PER_EPOCH, STEP_SECONDS = 10, 0.1
TOKENS_PER_STEP = 100
WEIGHTS_BYTES = 64 * 1024
WEIGHTS, MARK = "adapter_model.safetensors", "state.json"


@dataclass(frozen=True)
class At:
    """A run between two steps."""

    step: int
    weights: str

    def advanced(self, dataset_sha256: str) -> "At":
        return At(self.step + 1, _digest(self.weights, dataset_sha256, str(self.step + 1)))


def begun(seed: int) -> At:
    return At(0, _digest(str(seed)))


def content(at: At) -> bytes:
    """What the file of the weights holds."""
    return (at.weights.encode() * (WEIGHTS_BYTES // len(at.weights)))[:WEIGHTS_BYTES]


def sha256_after(*, seed: int, dataset_sha256: str, steps: int) -> str:
    """Of the weights of an undisturbed run."""
    at = begun(seed)
    for _ in range(steps):
        at = at.advanced(dataset_sha256)
    return hashlib.sha256(content(at)).hexdigest()


class _Run:
    def __init__(self, job: wire.TrainerJob, said: BinaryIO, stopping: threading.Event) -> None:
        self._job, self._said, self._stopping = job, said, stopping
        self._dataset_sha256 = hashlib.sha256(job.dataset.read_bytes()).hexdigest()
        self._total = job.spec.n_epochs * STEPS_PER_EPOCH

    def run(self) -> None:
        at = self._resumed()
        every = self._job.spec.checkpoint_every_steps
        self._say(
            Started(
                total_steps=self._total,
                resumed_from=at.step,
                trainable_parameters=1,
                checkpoint_every_steps=every,
                evaluation_tokens=0,
            )
        )
        while at.step < self._total:
            if self._stopping.is_set():
                self._keep(at)
                self._say(Stopped(step=at.step))
                return
            time.sleep(STEP_SECONDS)
            at = at.advanced(self._dataset_sha256)
            self._say(self._stepped(at))
            if at.step % every == 0 and at.step < self._total:
                self._keep(at)
        self._finish(at)

    def _resumed(self) -> At:
        """From the newest checkpoint that is whole."""
        found = [begun(self._job.spec.seed)]
        for directory in self._job.checkpoints_dir.glob("step-*"):
            manifest.read(directory / "adapter")
            state = manifest.read(directory / "state")
            found.append(At(state.step, (directory / "state" / MARK).read_text()))
        return max(found, key=lambda at: at.step)

    def _keep(self, at: At) -> None:
        directory = self._job.checkpoints_dir / f"step-{at.step:06d}"
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            _write(partial / "adapter", WEIGHTS, content(at), self._manifest(at, "checkpoint"))
            _write(partial / "state", MARK, at.weights.encode(), self._manifest(at, "state"))
            partial.rename(directory)
        handed_over = child.handed_over(directory, self._job.handover_dir)
        self._say(Checkpointed(step=at.step, directory=str(handed_over), metrics={"train_loss": 1 / at.step if at.step else 1.0}))
        steps = {int(kept.name.removeprefix("step-")): dict[str, float]() for kept in directory.parent.glob("step-*")}
        for step in steps.keys() - checkpoints.kept(steps, newest=at.step):
            for kept in directory.parent.glob(f"step-*{step}"):
                if int(kept.name.removeprefix("step-")) == step:
                    shutil.rmtree(kept)

    def _finish(self, at: At) -> None:
        _write(self._job.output_dir, WEIGHTS, content(at), self._manifest(at, "adapter"))
        table = self._job.output_dir.with_name("examples.csv")
        table.write_text("split,line\n")
        memory = MeasuredMemory(
            peak_bytes=1, measured_as="rss", micro_batch_tokens=self._job.micro_batch_tokens, is_checkpointing=False
        )
        self._say(
            Finished(
                step=at.step,
                trained_tokens=at.step * TOKENS_PER_STEP,
                directory=str(self._job.output_dir),
                table=str(table),
                memory=memory,
            )
        )

    def _stepped(self, at: At) -> Stepped:
        return Stepped(
            step=at.step,
            total_steps=self._total,
            train_loss=1 / at.step,
            train_mean_token_accuracy=0.5,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=TOKENS_PER_STEP,
            labelled_tokens=TOKENS_PER_STEP,
            tokens_left=(self._total - at.step) * TOKENS_PER_STEP,
            tokens_per_second=TOKENS_PER_STEP / STEP_SECONDS,
        )

    def _manifest(self, at: At, kind: str) -> Manifest:
        return Manifest(
            kind=kind,
            files={},
            base=BaseEntry(id=self._job.base.id, revision="toy", digest="0" * 64),
            dataset_sha256=self._dataset_sha256,
            template_sha256="",
            token_vectors=(),
            spec=self._job.spec.model_dump(mode="json"),
            code_version="toy",
            step=at.step,
            metrics={},
        )

    def _say(self, event: Event) -> None:
        self._said.write(event.model_dump_json().encode() + b"\n")
        self._said.flush()


def _write(directory: Path, name: str, body: bytes, told: Manifest) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(body)
    whole = told.model_copy(update={"files": {name: manifest.entry_of(directory / name)}})
    (directory / manifest.NAME).write_bytes(whole.to_bytes())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> int:
    child.die_with_parent()
    said = child.claim_stdout()
    jobs, stopping = queue.SimpleQueue[bytes](), threading.Event()
    threading.Thread(target=child.listen, args=(jobs, stopping), daemon=True).start()
    said.write(wire.READY)
    said.flush()
    _Run(wire.TrainerJob.model_validate_json(jobs.get()), said, stopping).run()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        status = 1
    os._exit(status)
