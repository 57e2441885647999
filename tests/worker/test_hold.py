"""What is in hand without a lease: held while it is worked on, and soon another's if nobody does."""

import os
import threading
import time
from datetime import datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import catalog
from app.core.settings import LeaseSettings, Settings
from app.core.storage import Storage
from app.files import service as files
from app.models import File, FileStatus, Job, JobState
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker import in_hand
from worker.hold import held
from worker.services import Services
from worker.tasks import cpu

LEASE_SECONDS = 0.6


@pytest.fixture
def services(settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage) -> Services:
    leases = LeaseSettings(lease_seconds=LEASE_SECONDS, heartbeat_seconds=0.1)
    return Services(settings.model_copy(update={"leases": leases}), system_sessions, storage, catalog.load())


def is_free(services: Services, file_id: str) -> bool:
    with services.sessions.begin() as session:
        return session.scalars(select(File.not_before <= func.clock_timestamp()).where(File.id == file_id)).one()


def held_for(services: Services, file_id: str) -> tuple[datetime, float]:
    """Until when, and how many seconds that is from now."""
    with services.sessions.begin() as session:
        left = func.extract("epoch", File.not_before - func.clock_timestamp())
        until, seconds = session.execute(select(File.not_before, left).where(File.id == file_id)).one()
        return until, float(seconds)


def test_what_is_in_hand_stays_there_for_as_long_as_it_takes(services: Services, organization: Caller) -> None:
    with services.sessions.begin() as session:
        file_id = make.uploaded_file(session, organization).id
    with held(services, partial(files.hold, file_id=file_id)):
        for _ in range(3):
            before = held_for(services, file_id)[0]
            eventually(lambda before=before: held_for(services, file_id)[0] > before)
    assert held_for(services, file_id)[1] <= LEASE_SECONDS
    eventually(lambda: is_free(services, file_id))


def test_what_was_given_back_is_not_held_once_more(
    services: Services, organization: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the process that leaves has still to end, and its heart beats meanwhile."""
    with services.sessions.begin() as session:
        file_id = make.uploaded_file(session, organization).id
    seen, ended = list[bool](), threading.Event()

    def end_slowly(_: int) -> None:
        seen.append(is_free(services, file_id))
        time.sleep(LEASE_SECONDS)
        seen.append(is_free(services, file_id))
        ended.set()

    monkeypatch.setattr(os, "_exit", end_slowly)
    monkeypatch.setattr(in_hand, "FINISH_SECONDS", LEASE_SECONDS / 2)
    with (
        services.in_hand.holding(lambda session: files.postpone(session, file_id, by=timedelta())),
        held(services, partial(files.hold, file_id=file_id)),
    ):
        services.in_hand.leave(services.sessions)
        assert ended.wait(PATIENCE_SECONDS)
    assert seen == [True, True]


def test_a_beat_that_fails_is_not_the_last(services: Services) -> None:
    failures, beats = iter([ValueError("whatever it is")]), threading.Event()

    def extend(session: orm.Session, *, lease_seconds: float) -> None:
        for failure in failures:
            raise failure
        beats.set()

    with held(services, extend):
        assert beats.wait(PATIENCE_SECONDS)


def test_whoever_uploads_many_files_keeps_nobodys_job_waiting(services: Services, organization: Caller, storage: Storage) -> None:
    while cpu.one_of_each(services):  # what other tests have left waits longer, and comes first
        pass
    with services.sessions.begin() as session:
        ready = make.stored_file(session, organization, storage, make.chat_file())
        job_id = make.job(session, organization, training_file=ready).id
        for _ in range(8):
            waiting = make.stored_file(session, organization, storage, make.chat_file())
            waiting.status = FileStatus.UPLOADED
    while cpu.one_of_each(services):
        with services.sessions.begin() as session:
            waiting_files = select(func.count()).where(File.organization_id == organization.organization_id)
            left = session.scalars(waiting_files.where(File.status == FileStatus.UPLOADED)).one()
            if session.scalars(select(Job.state).where(Job.id == job_id)).one() == JobState.QUEUED:
                break

    assert left > 0
