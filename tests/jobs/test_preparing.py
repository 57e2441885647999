"""A job between its creation and the queue: it waits for its files, and a bad file ends it."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import func, orm, select

from app.accounts.caller import Caller
from app.core import catalog, data
from app.core.errors import BadRequest, Conflict, NotFound
from app.files import service as files
from app.jobs import preparing
from app.jobs import service as jobs
from app.jobs.preparing import Dataset, Datasets
from app.jobs.schemas import JobCreate
from app.models import File, Job, JobState
from tests import make
from tests.conftest import make_organization

BAD = data.Report(rows=1, problem_count=1, problems=(data.Problem(line=3, code="not_json", message="not valid JSON", path="$"),))


@pytest.fixture
def session(system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[orm.Session]:
    with system_sessions() as opened:
        opened.query(Job).filter(Job.state == JobState.VALIDATING_FILES).update({"state": JobState.CANCELLED})
        yield opened
        opened.rollback()


def test_a_job_waits_for_a_file_that_is_still_validated(session: orm.Session, organization: Caller) -> None:
    file = make.uploaded_file(session, organization)
    job = make.job(session, organization, training_file=file)

    assert preparing.claim(session) is None
    files.finish_validation(session, file.id, data.Report(rows=1, problem_count=0))
    claimed = preparing.claim(session)
    assert claimed is not None and claimed.id == job.id
    assert preparing.claim(session) is None  # in hand


def test_what_a_dead_preparer_had_in_hand_is_soon_anothers(session: orm.Session, organization: Caller) -> None:
    """After a lease, however large the file is: who lives says so with every heartbeat."""
    file = make.valid_file(session, organization)
    file.size_bytes = 512 * 1024 * 1024
    job = make.job(session, organization, training_file=file)
    claimed = preparing.claim(session, lease_seconds=20)
    assert claimed is not None and claimed.seconds > 600
    session.refresh(job)

    now = session.scalars(select(func.clock_timestamp())).one()
    assert job.not_before - now < timedelta(seconds=21)
    preparing.hold(session, job.id, lease_seconds=50)
    session.flush()
    session.refresh(job)
    assert job.not_before - now > timedelta(seconds=40)
    make.make_due(session, job)
    assert preparing.claim(session) is not None


def test_a_waiting_job_fails_with_its_file(session: orm.Session, organization: Caller) -> None:
    file = make.uploaded_file(session, organization)
    job = make.job(session, organization, training_file=file)
    files.finish_validation(session, file.id, BAD)

    assert preparing.claim(session) is None
    assert job.state == JobState.FAILED
    assert job.error == {
        "code": "invalid_file",
        "message": f"{file.id} is not valid: {BAD.problems[0].told()}",
        "param": "training_file",
    }


def test_a_job_on_a_bad_file_is_refused(session: orm.Session, organization: Caller) -> None:
    file = make.uploaded_file(session, organization)
    files.finish_validation(session, file.id, BAD)

    with pytest.raises(Conflict, match="line 3"):
        make.job(session, organization, training_file=file)


def test_a_file_in_use_cannot_be_deleted(session: orm.Session, organization: Caller) -> None:
    job = make.job(session, organization)

    with pytest.raises(Conflict, match=job.id):
        files.delete(session, organization, job.training_file_id)
    jobs.cancel(session, organization, job.id)
    files.delete(session, organization, job.training_file_id)


def test_another_organizations_file_does_not_exist(
    session: orm.Session, organization: Caller, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    theirs = make.valid_file(session, make_organization(system_sessions))

    with pytest.raises(NotFound):
        make.job(session, organization, training_file=theirs)


def test_a_base_that_no_worker_holds_is_refused(session: orm.Session, organization: Caller) -> None:
    file = make.valid_file(session, organization)
    request = JobCreate(model="llama-3.3-70b-instruct", training_file=file.id)

    with pytest.raises(BadRequest, match="needs a GPU worker of 48 GB; this installation has: 24 GB, cpu"):
        jobs.create(session, organization, catalog.load(), request=request, tiers=frozenset({"cpu", "24"}))


def test_a_repeated_request_of_the_sdk_makes_no_second_job(session: orm.Session, organization: Caller) -> None:
    file = make.valid_file(session, organization)
    request = JobCreate(model=make.TINY, training_file=file.id, suffix="again")
    first, repeated, second = (
        jobs.create(session, organization, catalog.load(), request=request, tiers=make.CPU, is_retry=is_retry)
        for is_retry in (False, True, False)
    )

    assert repeated.id == first.id != second.id
    mine = session.scalars(select(Job.id).where(Job.organization_id == organization.organization_id)).all()
    assert len(mine) == 2


@pytest.mark.parametrize(("ask", "end"), [(jobs.cancel, JobState.CANCELLED), (jobs.pause, JobState.PAUSED)])
def test_a_job_that_is_to_stop_while_it_is_tokenised_is_never_queued(
    session: orm.Session, organization: Caller, ask: Callable[..., Job], end: JobState
) -> None:
    job = make.job(session, organization)
    claimed = preparing.claim(session)
    assert claimed is not None and claimed.id == job.id
    ask(session, organization, job.id)
    if end == JobState.CANCELLED:  # nobody waits for the tokeniser
        assert job.state == end
    datasets = Datasets(training=Dataset(key="nowhere", sha256="0" * 64))
    preparing.finish(session, job.id, admitted=make.admitted(), datasets=datasets)

    assert make.reread(session, job).state == end


def test_a_preparation_that_keeps_failing_ends_the_job(session: orm.Session, organization: Caller) -> None:
    job = make.job(session, organization)
    for _ in range(make.LEASES.max_attempts):
        assert job.state == JobState.VALIDATING_FILES
        preparing.failed(session, job.id, reason="the disk is full", settings=make.LEASES)

    assert job.state == JobState.FAILED
    assert job.error is not None and "the disk is full" in job.error["message"]


def test_a_repeat_of_another_request_is_another_job(session: orm.Session, organization: Caller) -> None:
    file = make.valid_file(session, organization)
    first, other = (
        jobs.create(
            session,
            organization,
            catalog.load(),
            request=JobCreate(model=make.TINY, training_file=file.id, seed=seed),
            tiers=make.CPU,
            is_retry=True,
        )
        for seed in (1, 2)
    )

    assert (first.seed, other.seed) == (1, 2)


def test_an_expired_file_is_forgotten_once_no_job_needs_it(session: orm.Session, organization: Caller) -> None:
    file = make.valid_file(session, organization)
    job = make.job(session, organization, training_file=file)
    file.expires_at = func.clock_timestamp() - timedelta(seconds=1)
    files.expire(session)
    assert session.get(File, file.id) is not None

    jobs.cancel(session, organization, job.id)
    files.expire(session)
    session.flush()
    assert session.scalar(select(File.id).where(File.id == file.id)) is None
