"""What a row knows stays in storage; what nobody knows of is never taken for it."""

import pytest
from sqlalchemy import orm, select

from app import references
from app.accounts.caller import Caller
from app.jobs import states
from app.models import Adapter, File, JobCheckpoint
from tests import make


@pytest.fixture
def session(system_sessions: orm.sessionmaker[orm.Session]) -> orm.Session:
    return system_sessions()


def test_of_a_file_its_bytes_are_known(session: orm.Session, organization: Caller) -> None:
    with session:
        file = make.valid_file(session, organization)
        orphan = f"orgs/{organization.organization_id}/files/file-gone"

        assert references.unknown(session, [file.storage_key], under=file.storage_key) == []
        assert references.unknown(session, [orphan], under=orphan) == [orphan]


def test_of_a_job_its_models_a_state_and_its_results_are_known(session: orm.Session, organization: Caller) -> None:
    with session:
        job = make.queued_job(session, organization)
        lease = make.claim(session, job)
        make.checkpoint(session, lease)
        make.complete(session, lease)
        session.flush()
        adapters = session.scalars(select(Adapter.prefix).where(Adapter.job_id == job.id)).all()
        (state,) = session.scalars(select(JobCheckpoint.prefix).where(JobCheckpoint.job_id == job.id))
        results = session.scalars(
            select(File.storage_key).where(File.purpose == "fine-tune-results", File.filename.contains(job.id))
        )
        known = [*(f"{prefix}/weights" for prefix in adapters), f"{state}/state/optimizer", *results]
        orphan = f"{states.prefix_of(job)}a9/step-3/adapter/weights"

        assert len(known) == 2 + 1 + 2
        assert references.unknown(session, [*known, orphan], under=states.prefix_of(job)) == [orphan]


def test_of_a_prefix_that_is_neither_nothing_is_deleted(session: orm.Session, organization: Caller) -> None:
    for under in ("uploads/upload_1/", "files/", ""):
        with session, pytest.raises(ValueError, match="nobody knows"):
            references.unknown(session, ["a"], under=f"orgs/{organization.organization_id}/{under}")
