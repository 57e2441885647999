"""Read an uploaded file once, check that storage kept it, and report on every line."""

import hashlib
from collections.abc import Iterable, Iterator

import structlog

from app.core import chat
from app.core.errors import NotFound, Unavailable
from app.core.storage import Storage
from app.files import service as files
from app.files.service import ToValidate
from worker import patience
from worker.services import Services

log = structlog.get_logger()


def validate_next(to: Services) -> bool:
    """Validate one file; False when none waits."""
    with to.sessions.begin() as session:
        file = files.claim_to_validate(session)
    if file is None:
        return False
    try:
        report = examine(to.storage, file)
    except Unavailable:
        log.warning("validation_postponed", file_id=file.id)
        patience.say(to.sessions, lambda session: files.postpone(session, file.id))
        return False
    except Exception:
        log.exception("validation_failed", file_id=file.id)
        report = _damaged("the file could not be read; upload it again, and tell the operator if that does not help")
    patience.say(to.sessions, lambda session: files.finish_validation(session, file.id, report))
    log.info("file_validated", file_id=file.id, rows=report.rows, problems=report.problem_count)
    return True


def examine(storage: Storage, file: ToValidate) -> chat.Report:
    """The report on a stored file. Some servers keep a body that does not match its checksum, so ours is compared first."""
    digest = hashlib.sha256()
    try:
        report = chat.validate(chat.split_lines(_hashed(storage.stream(file.storage_key), digest)))
    except NotFound:
        return _damaged("the stored file is gone; upload it again")
    if digest.hexdigest() != file.sha256:
        return _damaged("the stored file differs from what was uploaded; upload it again")
    return report


def _hashed(chunks: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _damaged(message: str) -> chat.Report:
    return chat.Report(rows=0, problem_count=1, problems=(chat.Problem(line=1, code="file_damaged", message=message),))
