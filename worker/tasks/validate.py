"""Read an uploaded file once, check that storage kept it, and have an examiner process report on every line."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import structlog

from app.core import crash, data, limited, tracing
from app.core.errors import NotFound, Unavailable
from app.core.storage import Storage
from app.files import service as files
from app.files.service import ToValidate
from worker import examiner, patience
from worker.hold import held
from worker.services import Services

log = structlog.get_logger()


def validate_next(to: Services) -> bool:
    """Validate one file; False when none waits."""
    with to.sessions.begin() as session:
        file = files.claim_to_validate(session, lease_seconds=to.settings.leases.lease_seconds)
    if file is None:
        return False
    with to.in_hand.holding(lambda session: files.postpone(session, file.id, by=timedelta())):
        return _validate(to, file)


def _validate(to: Services, file: ToValidate) -> bool:
    try:
        with (
            tracing.span("validate", file_id=file.id, purpose=file.purpose),
            held(to, partial(files.hold, file_id=file.id)),
        ):
            report = examine(to.storage, file)
    except Unavailable:
        log.warning("validation_postponed", file_id=file.id)
        patience.say(to.sessions, lambda session: files.postpone(session, file.id))
        return False
    except Exception:
        log.exception("validation_failed", file_id=file.id)
        report = _refused("file_damaged", "the file could not be read")
    crash.point("file_examined")
    patience.say(to.sessions, lambda session: files.finish_validation(session, file.id, report))
    crash.point("verdict_committed")
    log.info("file_validated", file_id=file.id, rows=report.rows, problems=report.problem_count, format=report.format)
    return True


def examine(storage: Storage, file: ToValidate) -> data.Report:
    """The report on a stored file. Some servers keep a body that does not match its checksum, so ours is compared first.

    Raises Unavailable, and OSError or CalledProcessError if the examiner ended in a way that says nothing of the file.
    """
    digest = hashlib.sha256()
    with _examiner(file.purpose, seconds=file.cpu_seconds) as process:
        try:
            _feed(process, storage.stream(file.storage_key), digest)
        except BaseException as error:
            process.kill()
            if isinstance(error, NotFound):
                return _refused("file_damaged", "the stored file is gone")
            raise
        assert process.stdout is not None
        said = process.stdout.read()
    if digest.hexdigest() != file.sha256:
        return _refused("file_damaged", "the stored file differs from what was uploaded")
    if process.returncode in (limited.OUT_OF_MEMORY, -signal.SIGABRT):  # the second is how the parser, which is Rust, says it
        return _refused("limits_exceeded", f"reading the file took more than {examiner.MEMORY_BYTES >> 20} MiB")
    if process.returncode == -signal.SIGXCPU:
        return _refused("limits_exceeded", f"reading the file took more than {file.cpu_seconds} seconds of processor time")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return data.Report.model_validate_json(said)


def _examiner(purpose: str, *, seconds: int) -> "subprocess.Popen[bytes]":
    """It gets no secret, and no signal that is meant for this process."""
    command = [sys.executable, "-m", "worker.examiner", str(seconds), str(examiner.MEMORY_BYTES), purpose]
    environment = limited.environment()
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)


def _feed(process: "subprocess.Popen[bytes]", chunks: Iterable[bytes], digest: "hashlib._Hash") -> None:
    """All of the file is hashed, though the examiner may have seen enough before its end."""
    assert process.stdin is not None
    is_listening = True
    for chunk in chunks:
        digest.update(chunk)
        if is_listening:
            try:
                process.stdin.write(chunk)
            except BrokenPipeError:
                is_listening = False
    with suppress(BrokenPipeError):
        process.stdin.close()


def _refused(code: str, message: str) -> data.Report:
    return data.Report(rows=0, problem_count=1, counts={code: 1}, problems=(data.Problem(line=1, code=code, message=message),))
