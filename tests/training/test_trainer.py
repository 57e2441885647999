"""The trainer as a process of its own, spoken to as its supervisor does."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from app.core import catalog, events, manifest
from app.core.events import Checkpointed, Finished, Stepped, Stopped
from app.core.memory import GIB
from app.core.planner import Room
from tests.embedded.patience import PATIENCE_SECONDS
from tests.make import TINY
from tests.training import make
from worker import wire
from worker.model.base import LoadedBase
from worker.trainer import must_checkpoint

Trainer = subprocess.Popen[bytes]


@contextmanager
def started(bases_dir: Path, **environment: str) -> Iterator[Trainer]:
    command = [sys.executable, "-m", "worker.trainer", "--cache-dir", str(bases_dir), "--warm", TINY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == wire.READY
        yield process
        process.kill()


@pytest.fixture
def trainer(tiny: LoadedBase, bases_dir: Path) -> Iterator[Trainer]:
    """Started and warm; `tiny` makes sure that its base is prepared. Nothing is compiled, but where a test says so."""
    with started(bases_dir, TORCH_COMPILE_DISABLE="1") as process:
        yield process


@pytest.fixture
def compiling_trainer(tiny: LoadedBase, bases_dir: Path) -> Iterator[Trainer]:
    with started(bases_dir) as process:
        yield process


def send(process: Trainer, line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def job(base: LoadedBase, folder: Path, **asked: object) -> bytes:
    make.examples(base.renderer).write(folder / "training.safetensors")
    spec = make.spec(**asked)
    made = wire.TrainerJob(
        spec=spec,
        base=catalog.load()[TINY],
        dataset=folder / "training.safetensors",
        output_dir=folder / "adapter",
        checkpoints_dir=folder / "checkpoints",
        handover_dir=folder / "handover",
        micro_batch_tokens=spec.micro_batch_tokens,
    )
    return made.model_dump_json().encode() + b"\n"


def words_of(process: Trainer) -> Iterator[events.Event]:
    assert process.stdout is not None
    yield from map(events.parse, process.stdout)


def test_it_trains_the_job_it_is_given_and_ends(compiling_trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(compiling_trainer, job(tiny, tmp_path, n_epochs=4))
    *said, last = words_of(compiling_trainer)

    assert isinstance(last, Finished) and (tmp_path / "adapter" / "manifest.json").exists()
    assert last.memory.measured_as == "rss" and last.memory.peak_bytes > 50_000_000
    assert (last.memory.micro_batch_tokens, last.memory.is_checkpointing) == (160, False)
    assert compiling_trainer.wait(PATIENCE_SECONDS) == 0
    handed_over = [Path(event.directory) for event in said if isinstance(event, Checkpointed)]
    assert len(handed_over) == 5 and len(list((tmp_path / "checkpoints").iterdir())) == 2
    for directory in handed_over:  # the supervisor may take its time to upload them
        assert manifest.read(directory / "adapter").kind == "checkpoint" and manifest.read(directory / "state").files


def test_told_to_stop_it_keeps_a_checkpoint(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(trainer, job(tiny, tmp_path, n_epochs=100, checkpoint_every_steps=1000))
    words = words_of(trainer)
    next(event for event in words if isinstance(event, Stepped))
    send(trainer, wire.STOP)
    *_, kept, last = words

    assert isinstance(kept, Checkpointed) and isinstance(last, Stopped) and kept.step == last.step > 0
    assert trainer.wait(PATIENCE_SECONDS) == 0


def test_it_ends_with_its_supervisor(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(trainer, job(tiny, tmp_path, n_epochs=100))
    next(event for event in words_of(trainer) if isinstance(event, Stepped))
    assert trainer.stdin is not None
    trainer.stdin.close()

    assert trainer.wait(PATIENCE_SECONDS) == 1


def test_a_failure_is_said_in_one_event(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    asked = job(tiny, tmp_path)
    (tmp_path / "training.safetensors").unlink()
    send(trainer, asked)
    (said,) = words_of(trainer)

    assert isinstance(said, events.Failed) and (said.code, said.is_user_error) == ("internal_error", False)
    assert str(tmp_path) not in said.message
    assert trainer.wait(PATIENCE_SECONDS) == 1


def test_killed_at_any_step_and_taken_over_it_ends_with_the_same_bits(tiny: LoadedBase, bases_dir: Path, tmp_path: Path) -> None:
    def go(folder: Path, *, kill_at: int | None = None) -> None:
        with started(bases_dir, TORCH_COMPILE_DISABLE="1") as process:
            send(process, job(tiny, folder, n_epochs=4, checkpoint_every_steps=3))
            for event in words_of(process):
                if isinstance(event, Stepped) and event.step == kill_at:
                    process.kill()

    straight, taken_over = tmp_path / "straight", tmp_path / "taken over"
    for folder in (straight, taken_over):
        folder.mkdir()
    kill_at = random.randrange(1, 12)
    go(straight)
    go(taken_over, kill_at=kill_at)
    go(taken_over)

    def left_by(folder: Path) -> list[bytes]:
        """The adapter, and the last checkpoint: weights, optimizer, how far it is."""
        checkpoint = folder / "checkpoints" / "step-000009"
        parts = ("adapter/adapter_model.safetensors", "state/optimizer.safetensors", "state/state.json")
        return [(folder / parts[0]).read_bytes(), *((checkpoint / part).read_bytes() for part in parts)]

    assert left_by(taken_over) == left_by(straight), kill_at


def test_a_card_with_less_room_than_the_run_takes_has_its_layers_computed_again(tiny: LoadedBase, tmp_path: Path) -> None:
    asked = wire.TrainerJob.model_validate_json(job(tiny, tmp_path)).model_copy(update={"micro_batch_tokens": 4096})
    large = asked.model_copy(update={"base": catalog.load()["llama-3.1-8b-instruct"]})
    card = partial(Room, tier="card", device="cuda", reserved_bytes=0)

    assert [must_checkpoint(large, card(usable_bytes=gib * GIB)) for gib in (40, 21, 12, 1)] == [False, False, True, True]
    assert not must_checkpoint(large, None)  # a CPU's memory is not planned


def test_a_job_without_memory_is_tried_with_half_the_tokens_and_layers_computed_again(tiny: LoadedBase, tmp_path: Path) -> None:
    asked = wire.TrainerJob.model_validate_json(job(tiny, tmp_path)).model_copy(update={"micro_batch_tokens": 600})
    smaller = asked.smaller()

    assert smaller is not None and (smaller.micro_batch_tokens, smaller.is_checkpointing) == (300, True)
    assert smaller.spec == asked.spec
    assert (half := smaller.smaller()) is not None and half.smaller() is None


def test_a_trainer_that_is_short_of_memory_says_so(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    held = psutil.Process(trainer.pid)
    held.rlimit(psutil.RLIMIT_AS, (held.memory_info().vms + 2**20, psutil.RLIM_INFINITY))
    more_than_warming_up_took = job(tiny, tmp_path, batch_size=400, micro_batch_tokens=60_000)
    make.examples(tiny.renderer, 400).write(tmp_path / "training.safetensors")
    send(trainer, more_than_warming_up_took)
    *_, said = words_of(trainer)

    assert isinstance(said, events.Failed) and (said.code, said.is_user_error) == (events.OUT_OF_MEMORY, False)
