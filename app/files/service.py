"""Files: bytes in S3, a row that says what they are, a report that says whether they can be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, func, or_, orm, select, update

from app import outbox, pages
from app.accounts.caller import Caller
from app.core import data, ids, methods
from app.core.errors import Conflict, NotFound
from app.core.methods import MethodName
from app.core.storage import Stored
from app.files import derived
from app.models import Evaluation, File, FileStatus, Job, Upload
from app.models.evaluations import UNDECIDED
from app.models.jobs import UNFINISHED

CPU_QUEUE = "cpu"
POSTPONED = timedelta(seconds=5)
LONGEST_UPLOAD = timedelta(days=1)
LEAST_TO_READ = timedelta(seconds=30)
SLOWEST_BYTES_PER_SECOND = 256 * 1024  # tokenising on a busy core, the slowest thing done with a file


@dataclass(frozen=True)
class ToValidate:
    """A file in the hands of one validator."""

    id: str
    storage_key: str
    sha256: str
    cpu_seconds: int
    purpose: str = data.TO_TRAIN


def key_for(owner: Caller | Upload, file_id: str) -> str:
    return f"orgs/{owner.organization_id}/files/{file_id}"


def promise(session: orm.Session, caller: Caller, file_id: str) -> None:
    """Before the first byte is stored: should whoever stores them die before there is a row, they do not lie there for ever."""
    outbox.put(session, outbox.Topic.TIDY, {"prefix": key_for(caller, file_id)}, after=LONGEST_UPLOAD)


def add(
    session: orm.Session,
    caller: Caller,
    *,
    file_id: str,
    filename: str,
    purpose: str,
    stored: Stored,
    expires_after_seconds: int | None = None,
) -> File:
    """Make an uploaded object known and ask for its validation."""
    expires_at = func.clock_timestamp() + timedelta(seconds=expires_after_seconds) if expires_after_seconds else None
    file = File(
        id=file_id,
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        filename=filename,
        purpose=purpose,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        storage_key=key_for(caller, file_id),
        status=FileStatus.UPLOADED,
        expires_at=expires_at,
    )
    session.add(file)
    outbox.ring(session, CPU_QUEUE)
    session.flush()
    session.refresh(file)
    return file


@dataclass(frozen=True)
class Result:
    """A table that a job leaves, as it lies in storage."""

    name: str
    key: str
    stored: Stored


def add_result(session: orm.Session, job: Job, result: Result) -> File:
    """As a file of the job's owner."""
    file = File(
        id=ids.new("file-"),
        organization_id=job.organization_id,
        project_id=job.project_id,
        filename=f"{job.id}-{result.name}",
        purpose="fine-tune-results",
        size_bytes=result.stored.size_bytes,
        sha256=result.stored.sha256,
        storage_key=result.key,
        status=FileStatus.PROCESSED,
    )
    session.add(file)
    return file


def get(
    session: orm.Session,
    caller: Caller,
    file_id: str,
    *,
    param: str | None = None,
    lock: Literal["share", "update"] | None = None,
) -> File:
    """Raises NotFound, also for a file of somebody else. `lock` keeps the row from changing until the commit."""
    if file := find(session, caller, file_id, lock=lock):
        return file
    raise NotFound(
        f"the file {file_id!r} does not exist or is not yours; GET /v1/files lists them", param=param, code="file_not_found"
    )


def find(session: orm.Session, caller: Caller, file_id: str, *, lock: Literal["share", "update"] | None = None) -> File | None:
    query = _visible(caller).where(File.id == file_id)
    return session.scalar(query if lock is None else query.with_for_update(read=lock == "share"))


def get_for_training(session: orm.Session, caller: Caller, file_id: str, *, method: MethodName, param: str) -> File:
    """A file that a job may name: still being validated, or valid. The row is locked against deletion until the commit."""
    file = get(session, caller, file_id, param=param, lock="share")
    require_purpose(file, data.TO_TRAIN, param=param)
    require_trainable(file, method, param=param)
    return file


def get_for_evaluation(session: orm.Session, caller: Caller, file_id: str, *, param: str) -> File:
    """The same for a file that models are to be asked from."""
    file = get(session, caller, file_id, param=param, lock="share")
    require_purpose(file, data.TO_EVALUATE, param=param)
    require_valid(file, param=param)
    return file


def require_purpose(file: File, purpose: str, *, param: str) -> None:
    """Raises Conflict for a file that was uploaded for something else."""
    if file.purpose != purpose:
        message = f"{file.id} has purpose {file.purpose!r}; upload it with purpose {purpose!r}"
        raise Conflict(message, param=param, code="wrong_purpose")


def require_valid(file: File, *, param: str) -> None:
    """Raises Conflict for a file that is not. One not yet read passes."""
    if file.status == FileStatus.ERROR:
        raise Conflict(f"{file.id} is not valid: {file.status_details}", param=param, code="invalid_file")


def require_trainable(file: File, method: MethodName, *, param: str) -> None:
    """Raises Conflict for a file that is not valid, or whose rows the method does not train on. One not yet read passes."""
    require_valid(file, param=param)
    require_trained_format((file.report or {}).get("format"), file.id, method, param=param)


def require_trained_format(held: str | None, file_id: str, method: MethodName, *, param: str) -> None:
    """Raises Conflict for rows of a format that the method does not train on."""
    if held is not None and held not in methods.FORMATS[method]:
        others = " or ".join(map(repr, methods.reading(held)))
        advice = f"; for these rows set method.type to {others}" if others else ""
        message = f"{file_id} holds {held} rows; the method {method!r} trains on {', '.join(methods.FORMATS[method])}{advice}"
        raise Conflict(message, param=param, code="format_not_trained")


def list_page(
    session: orm.Session, caller: Caller, *, purpose: str | None, after: str | None, limit: int, order: pages.Order
) -> tuple[Sequence[File], bool]:
    query = _visible(caller)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return pages.fetch(session, query, File.id, after=after, limit=limit, order=order)


def delete(session: orm.Session, caller: Caller, file_id: str) -> str:
    """Forget a file and free its storage. Raises Conflict while a job or an evaluation needs it."""
    file = get(session, caller, file_id, lock="update")
    jobs_on = _jobs_on(file_id).where(Job.organization_id == caller.organization_id)
    evaluations_on = _evaluations_on(file_id).where(Evaluation.organization_id == caller.organization_id)
    for kind, users in (("job", jobs_on), ("evaluation", evaluations_on)):
        if user := session.scalar(users.limit(1)):
            raise Conflict(f"{file_id} is in use by {kind} {user}; wait for it or cancel it", code="file_in_use")
    _forget(session, file)
    return file.id


def expire(session: orm.Session) -> int:
    """Forget some of the files whose time is over and that no job and no evaluation needs. Returns how many."""
    is_needed = or_(_jobs_on(File.id).exists(), _evaluations_on(File.id).exists())
    over = select(File).where(File.expires_at <= func.clock_timestamp(), ~is_needed)
    gone = session.scalars(over.order_by(File.expires_at).limit(100).with_for_update(skip_locked=True)).all()
    for file in gone:
        _forget(session, file)
    return len(gone)


def claim_to_validate(session: orm.Session, *, lease_seconds: float = 60.0) -> ToValidate | None:
    """The oldest file that nobody validates. A validator that says no more for a lease leaves it to the next one."""
    file = session.scalar(
        select(File).where(claimable(func.clock_timestamp())).order_by(File.id).limit(1).with_for_update(skip_locked=True)
    )
    if file is None:
        return None
    file.not_before = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    return ToValidate(file.id, file.storage_key, file.sha256, round(time_to_read(file).total_seconds()), file.purpose)


def claimable(since: Any) -> ColumnElement[bool]:
    """Whether a file waits, since this instant at the latest, for somebody to validate it."""
    return and_(File.status == FileStatus.UPLOADED, File.not_before <= since)


def hold(session: orm.Session, file_id: str, *, lease_seconds: float) -> None:
    """Its validator works on it still. Should two do so, that costs time and no more."""
    until = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    session.execute(update(File).where(File.id == file_id, File.status == FileStatus.UPLOADED).values(not_before=until))


def time_to_read(*files: File | None) -> timedelta:
    """What reading them may take of a processor."""
    return LEAST_TO_READ + timedelta(seconds=sum(file.size_bytes for file in files if file) / SLOWEST_BYTES_PER_SECOND)


def finish_validation(session: orm.Session, file_id: str, report: data.Report) -> None:
    """Store the verdict, and wake whoever prepares the jobs that waited for it. A file deleted meanwhile is no error."""
    file = session.scalar(select(File).where(File.id == file_id).with_for_update())
    if file is None:
        return
    file.status = FileStatus.PROCESSED if report.is_valid else FileStatus.ERROR
    file.status_details = None if report.is_valid else report.summary()
    file.report = report.model_dump(mode="json")
    outbox.ring(session, CPU_QUEUE)


def postpone(session: orm.Session, file_id: str, *, by: timedelta = POSTPONED) -> None:
    """Whoever had it in hand could not go on; another may try shortly."""
    if file := session.scalar(select(File).where(File.id == file_id).with_for_update()):
        file.not_before = func.clock_timestamp() + by


def _jobs_on(file_id: Any) -> Select[str]:
    """Ids of unfinished jobs that name the file, or an evaluation of it for their quality gate."""
    of_gate = select(Evaluation.file_id).where(Evaluation.id == Job.quality_gate["evaluation"].astext).scalar_subquery()
    names_it = or_(Job.training_file_id == file_id, Job.validation_file_id == file_id, of_gate == file_id)
    return select(Job.id).where(names_it, Job.state.in_(UNFINISHED))


def _evaluations_on(file_id: Any) -> Select[str]:
    return select(Evaluation.id).where(Evaluation.file_id == file_id, Evaluation.state.in_(UNDECIDED))


def _forget(session: orm.Session, file: File) -> None:
    session.delete(file)
    session.flush()
    derived.forget(session, file.organization_id, file.sha256)
    outbox.put(session, outbox.Topic.PURGE, {"prefix": file.storage_key})


def _visible(caller: Caller) -> Select[File]:
    return select(File).where(
        File.organization_id == caller.organization_id,
        File.project_id == caller.project_id,
        or_(File.expires_at.is_(None), File.expires_at > func.clock_timestamp()),
    )
