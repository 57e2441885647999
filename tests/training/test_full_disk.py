"""A disk without room: nothing half written counts, what was there stays, and the run goes on once there is room."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.events import DISK_FULL, Checkpointed, Event, Finished, Started
from tests import small_disk
from tests.training import make
from tests.training.make import Runner
from worker.model.base import LoadedBase
from worker.training.failures import failed


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk.mounted(tmp_path / "disk", mib=4) as folder:
        yield folder


def test_a_full_disk_breaks_the_run_and_leaves_its_last_checkpoint_whole(tiny: LoadedBase, tmp_path: Path, disk: Path) -> None:
    straight, runner = Runner(tiny, tmp_path / "straight"), Runner(tiny, disk / "run")
    straight.go(make.spec())

    def fill_up(event: Event) -> None:
        if isinstance(event, Checkpointed):
            small_disk.fill(disk)

    runner.listener = fill_up
    with pytest.raises(OSError, match="No space left") as caught:
        runner.go(make.spec())

    said = failed(caught.value)
    assert (said.code, said.is_user_error, said.path) == (DISK_FULL, False, str(runner.paths.checkpoints / "step-000004"))
    assert str(disk) not in said.message
    assert [path.name for path in runner.paths.checkpoints.iterdir()] == ["step-000002"]

    small_disk.clear(disk)
    runner.listener = lambda event: None
    assert isinstance(runner.go(make.spec()), Finished)
    assert runner.of(Started)[1].resumed_from == 2
    assert runner.weights == straight.weights


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_library_s_own_error_is_known_by_the_system_s_words(number: int) -> None:
    said = failed(RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"))

    assert (said.code, said.path) == (DISK_FULL, None)
