"""The trainer process: one job, then it ends. `python -m worker.trainer --cache-dir DIR [--warm BASE]`.

It has no database, no bucket and no broker: files come and go through its supervisor, words through its pipes (worker.wire).
"""

import argparse
import os
import queue
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.core import catalog, planner
from app.core.events import Checkpointed, Event
from app.core.planner import Room, Run
from app.core.settings import GpuSettings
from app.core.spec import QuantizationSpec
from worker import child, gpu, wire
from worker.model import base as bases
from worker.model.base import LoadedBase
from worker.training import fused
from worker.training.failures import failed
from worker.training.run import Paths, run
from worker.training.trainee import warm_up
from worker.training.workspace import keep_pages


def main() -> int:
    asked = _arguments()
    child.die_with_parent()
    said = child.claim_stdout()
    jobs, stopping = queue.SimpleQueue[bytes](), threading.Event()
    threading.Thread(target=child.listen, args=(jobs, stopping), daemon=True).start()
    gpu.limit_trainer(asked.gpu)
    keep_pages()
    fused.keep_in(asked.cache_dir)
    warm = _warmed(asked.warm, asked.catalog, asked.cache_dir) if asked.warm else None
    said.write(wire.READY)
    said.flush()
    job = wire.TrainerJob.model_validate_json(jobs.get())
    job = job.model_copy(update={"is_checkpointing": job.is_checkpointing or must_checkpoint(job, gpu.room(asked.gpu))})
    return _run(job, warm, asked.cache_dir, said, stopping)


def must_checkpoint(job: wire.TrainerJob, room: Room | None) -> bool:
    """Whether layers must be computed again in the room of this card, which may be more than the job's tier promised.

    Not a bit of the result depends on it.
    """
    if room is None:
        return False
    run = Run(
        model=job.base.architecture,
        lora=job.spec.lora,
        quantization=job.spec.quantization,
        optimizer=job.spec.optimizer.kind,
        keeps_start=job.spec.keeps_start,
        longest_tokens=1,
        mean_tokens=1,
        batch_size=1,
        micro_batch_tokens=job.micro_batch_tokens,
    )
    return planner.plan(run, (room,)).is_checkpointing


def _run(job: wire.TrainerJob, warm: "_Warm | None", cache_dir: Path, said: BinaryIO, stopping: threading.Event) -> int:
    def say(event: Event) -> None:
        if isinstance(event, Checkpointed):
            event = event.model_copy(update={"directory": str(child.handed_over(Path(event.directory), job.handover_dir))})
        said.write(event.model_dump_json().encode() + b"\n")
        said.flush()

    paths = Paths(
        dataset=job.dataset,
        validation=job.validation,
        start=job.start,
        output=job.output_dir,
        checkpoints=job.checkpoints_dir,
        cache=cache_dir,
    )
    try:
        base_model = warm.loaded if warm and warm.serves(job) else None
        del warm  # a base that this job does not want must not lie in memory beside the one it does
        run(
            job.spec,
            paths,
            job.base,
            base_model=base_model,
            micro_batch_tokens=job.micro_batch_tokens,
            is_checkpointing=job.is_checkpointing,
            on_event=say,
            should_stop=stopping.is_set,
        )
    except Exception as error:  # whatever it is, the supervisor hears of it; the traceback is for the log
        traceback.print_exc()
        say(failed(error))
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--catalog", type=Path)
    parser.add_argument("--warm", metavar="BASE")
    parser.add_argument("--gpu", type=GpuSettings.model_validate_json, default=GpuSettings(), metavar="JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class _Warm:
    """A base that was loaded before it was known which one the job wants."""

    base: catalog.Base
    loaded: LoadedBase

    def serves(self, job: wire.TrainerJob) -> bool:
        return self.base == job.base and job.spec.quantization == QuantizationSpec()


def _warmed(name: str, extra: Path | None, cache_dir: Path) -> _Warm | None:
    """None if it cannot be loaded: the job may want another, and if not, it fails with that reason."""
    try:
        base = catalog.load(extra).resolve(name)
        loaded = bases.load(base, cache_dir, for_training=True)
        warm_up(loaded)
        return _Warm(base, loaded)
    except Exception:
        traceback.print_exc()
        return None


if __name__ == "__main__":
    os._exit(main())  # the listening thread holds stdin, at which an orderly exit would abort; nothing is left to tidy up
