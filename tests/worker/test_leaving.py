"""A cpu worker as it is deployed is told to go: what it has in hand it finishes, or another takes it at once."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest
from sqlalchemy import func, orm, select, update

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.core.storage import Storage
from app.models import File, FileStatus
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.stack import command_of
from worker import in_hand
from worker.celery import make_celery
from worker.embedded import environment
from worker.embedded.programs import WORKER_GRACE_SECONDS
from worker.train import celery_arguments

Sessions = orm.sessionmaker[orm.Session]
SECRETS = ("DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL", "ENGINE_TOKEN")


@pytest.fixture
def files(system_sessions: Sessions, storage: Storage, organization: Caller) -> list[str]:
    """Two that wait, and no others."""
    with system_sessions.begin() as session:
        later = func.clock_timestamp() + timedelta(hours=1)
        session.execute(update(File).where(File.status == FileStatus.UPLOADED).values(not_before=later))
        made = [make.stored_file(session, organization, storage, make.chat_file(20_000)) for _ in range(2)]
        for file in made:
            file.status = FileStatus.UPLOADED
        return [file.id for file in made]


@contextmanager
def examining(settings: Settings, *, finish_seconds: float) -> Iterator[tuple["subprocess.Popen[bytes]", psutil.Process]]:
    """A worker with a file in hand, whose examiner does not get on. It takes so long for what it has in hand when it leaves."""
    begin = f"from worker.celery import celery; celery.start({[*celery_arguments('cpu', 'cpu')]})"
    command = (sys.executable, "-c", f"from worker import in_hand; in_hand.FINISH_SECONDS = {finish_seconds}; {begin}")
    worker = subprocess.Popen(command, env=environment.of(settings, secrets=SECRETS))
    try:
        make_celery(settings).send_task("cpu.look", args=["cpu"], queue="cpu")
        eventually(lambda: any(_examiners(worker)))
        (examiner,) = _examiners(worker)  # which has much to read
        examiner.suspend()
        worker.send_signal(signal.SIGTERM)
        yield worker, examiner
    finally:
        worker.kill()
        worker.wait()


def _examiners(worker: "subprocess.Popen[bytes]") -> Iterator[psutil.Process]:
    return (child for child in psutil.Process(worker.pid).children() if "worker.examiner" in command_of(child))


def states(sessions: Sessions, files: list[str]) -> list[tuple[str, bool]]:
    """The status of each, and whether a worker that looks now takes it."""
    with sessions.begin() as session:
        is_due = File.not_before <= func.clock_timestamp()
        return [tuple(session.execute(select(File.status, is_due).where(File.id == file)).one()) for file in files]


def test_what_it_has_in_hand_is_finished_or_left_to_others(
    settings: Settings, system_sessions: Sessions, files: list[str]
) -> None:
    assert in_hand.FINISH_SECONDS < WORKER_GRACE_SECONDS
    with examining(settings, finish_seconds=PATIENCE_SECONDS) as (worker, examiner):
        examiner.resume()
        assert worker.wait(PATIENCE_SECONDS) == 0
    assert states(system_sessions, files) == [(FileStatus.PROCESSED, False), (FileStatus.UPLOADED, True)]

    with examining(settings, finish_seconds=15) as (worker, _):
        assert states(system_sessions, files)[1] == (FileStatus.UPLOADED, False)
        assert worker.wait(PATIENCE_SECONDS) == 0
    assert states(system_sessions, files)[1] == (FileStatus.UPLOADED, True)
