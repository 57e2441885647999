"""The trainer as a process of its own, spoken to as its supervisor does."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core import catalog, events
from app.core.events import Checkpointed, Finished, Stepped, Stopped
from tests.make import TINY
from tests.training import make
from worker import wire
from worker.model.base import LoadedBase

Trainer = subprocess.Popen[bytes]


@pytest.fixture
def trainer(tiny: LoadedBase, bases_dir: Path) -> Iterator[Trainer]:
    """Started and warm; `tiny` makes sure that its base is prepared."""
    command = [sys.executable, "-m", "worker.trainer", "--cache-dir", str(bases_dir), "--warm", TINY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == wire.READY
        yield process
        process.kill()


def send(process: Trainer, line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def job(base: LoadedBase, folder: Path, **asked: object) -> bytes:
    make.examples(base.renderer).write(folder / "training.safetensors")
    made = wire.TrainerJob(
        spec=make.spec(**asked),
        base=catalog.load()[TINY],
        dataset=folder / "training.safetensors",
        output_dir=folder / "adapter",
        checkpoints_dir=folder / "checkpoints",
    )
    return made.model_dump_json().encode() + b"\n"


def words_of(process: Trainer) -> Iterator[events.Event]:
    assert process.stdout is not None
    yield from map(events.parse, process.stdout)


def test_it_trains_the_job_it_is_given_and_ends(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(trainer, job(tiny, tmp_path))
    *_, last = words_of(trainer)

    assert isinstance(last, Finished) and (tmp_path / "adapter" / "manifest.json").exists()
    assert last.peak_rss_bytes > 50_000_000
    assert trainer.wait(10) == 0


def test_told_to_stop_it_keeps_a_checkpoint(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(trainer, job(tiny, tmp_path, n_epochs=100, checkpoint_every_steps=1000))
    words = words_of(trainer)
    next(event for event in words if isinstance(event, Stepped))
    send(trainer, wire.STOP)
    *_, kept, last = words

    assert isinstance(kept, Checkpointed) and isinstance(last, Stopped) and kept.step == last.step > 0
    assert trainer.wait(10) == 0


def test_it_ends_with_its_supervisor(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    send(trainer, job(tiny, tmp_path, n_epochs=100))
    next(event for event in words_of(trainer) if isinstance(event, Stepped))
    assert trainer.stdin is not None
    trainer.stdin.close()

    assert trainer.wait(10) == 1


def test_a_failure_is_said_in_one_event(trainer: Trainer, tiny: LoadedBase, tmp_path: Path) -> None:
    asked = job(tiny, tmp_path)
    (tmp_path / "training.safetensors").unlink()
    send(trainer, asked)
    (said,) = words_of(trainer)

    assert isinstance(said, events.Failed) and (said.code, said.is_user_error) == ("internal_error", False)
    assert str(tmp_path) not in said.message
    assert trainer.wait(10) == 1
