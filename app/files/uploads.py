"""Uploads: files that come in parts, in any order and several at once, and are put together when all are there.

All of an upload lies under one prefix of storage, but for the whole, which is a file's. It is purged when the upload ends, and
once more a day later, for what was still on its way then.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sqlalchemy import delete, func, orm, select

from app import db, outbox
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import BadRequest, Conflict, NotFound, TooLarge
from app.core.settings import LimitSettings
from app.core.storage import Stored
from app.files import service as files
from app.files.upload_schemas import MAX_PARTS, PartOut, UploadCreate, UploadOut, UploadWithParts
from app.models import Upload, UploadPart, UploadStatus

LIFETIME: Final = timedelta(hours=1)
ASSEMBLING: Final = timedelta(hours=1)  # more, for putting together what somebody began to put together in time
REMEMBERED: Final = timedelta(days=1)
MAX_PENDING: Final = 200  # of a project


@dataclass(frozen=True)
class Place:
    """Where the bytes of a new part go, and how many there may be."""

    part_id: str
    key: str
    most_bytes: int


@dataclass(frozen=True)
class Piece:
    """A part as it must lie in storage."""

    part_id: str
    key: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What a file is put together from, and where."""

    upload_id: str
    part_ids: list[str]
    file_id: str
    key: str
    pieces: tuple[Piece, ...]


def create(session: orm.Session, caller: Caller, *, request: UploadCreate, limits: LimitSettings) -> Upload:
    """Raises TooLarge, Conflict if the project has too many that are pending."""
    if request.bytes > limits.upload_bytes:
        message = f"bytes is {request.bytes}, and an upload may have {limits.upload_bytes}: split the file"
        raise TooLarge(message, param="bytes", code="upload_too_large")
    db.take_turns(session, f"uploads of {caller.project_id}")
    mine = Upload.organization_id == caller.organization_id, Upload.project_id == caller.project_id
    pending = select(func.count()).select_from(Upload).where(*mine, Upload.status == UploadStatus.PENDING)
    if session.scalars(pending).one() >= MAX_PENDING:
        message = f"the project has {MAX_PENDING} uploads pending: complete or cancel some, or wait until they expire"
        raise Conflict(message, code="too_many_uploads")
    expires_at = func.clock_timestamp() + LIFETIME
    upload = Upload(
        id=ids.new("upload_"),
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        filename=request.filename,
        purpose=request.purpose,
        size_bytes=request.bytes,
        file_expires_after_seconds=request.expires_after.seconds if request.expires_after else None,
        expires_at=expires_at,
        sweep_at=expires_at,
    )
    session.add(upload)
    session.flush()
    return upload


def get(session: orm.Session, caller: Caller, upload_id: str) -> Upload:
    """Locked until the commit, and expired if its time is over. Raises NotFound, also for an upload of somebody else."""
    mine = Upload.organization_id == caller.organization_id, Upload.project_id == caller.project_id
    is_over = Upload.sweep_at <= func.clock_timestamp()
    found = session.execute(select(Upload, is_over).where(Upload.id == upload_id, *mine).with_for_update()).one_or_none()
    if found is None:
        message = f"the upload {upload_id!r} does not exist, has been over for a day, or is not yours; create a new one"
        raise NotFound(message, code="upload_not_found")
    upload, has_expired = found
    if has_expired and upload.status == UploadStatus.PENDING:
        _end(session, upload, UploadStatus.EXPIRED)
    return upload


def show(session: orm.Session, caller: Caller, upload_id: str) -> UploadWithParts:
    """With its parts, and with the file that it became, unless that was deleted. Raises NotFound."""
    upload = get(session, caller, upload_id)
    file = files.find(session, caller, upload.file_id) if upload.file_id else None
    parts = [PartOut.of(part) for part in list_parts(session, upload)]
    return UploadWithParts(**UploadOut.of(upload, file).model_dump(), parts=parts)


def list_parts(session: orm.Session, upload: Upload) -> Sequence[UploadPart]:
    return session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id).order_by(UploadPart.id)).all()


def place_part(session: orm.Session, caller: Caller, upload_id: str, *, limits: LimitSettings) -> Place:
    """Raises NotFound, and Conflict if the upload takes no more parts."""
    upload = get(session, caller, upload_id)
    _require_open(session, upload)
    if _count_parts(session, upload) >= MAX_PARTS:
        message = f"{upload_id} has {MAX_PARTS} parts, and may have no more: begin again with larger ones"
        raise Conflict(message, param="data", code="too_many_parts")
    part_id = ids.new("part_")
    return Place(part_id, f"{_prefix(upload)}parts/{part_id}", min(limits.part_bytes, upload.size_bytes))


def add_part(session: orm.Session, caller: Caller, upload_id: str, *, place: Place, stored: Stored) -> UploadPart:
    """Make a part known that lies in storage. If its bytes came before, it is those: who gets no answer sends them again.

    Raises NotFound; Conflict if the upload takes no more parts; BadRequest if this is more than it said it would be.
    """
    upload = get(session, caller, upload_id)
    _require_open(session, upload)
    if not stored.size_bytes:
        raise BadRequest("the part is empty; send at least one byte", param="data")
    key = _find_same(session, upload, stored)
    if key is None:
        _require_room(upload, stored.size_bytes)
        upload.received_bytes += stored.size_bytes
    else:
        outbox.put(session, outbox.Topic.PURGE, {"prefix": place.key})
    part = UploadPart(
        id=place.part_id,
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        upload_id=upload.id,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        storage_key=key or place.key,
    )
    session.add(part)
    session.flush()
    return part


def plan(session: orm.Session, caller: Caller, upload_id: str, *, part_ids: list[str]) -> Plan | None:
    """What is to be put together to complete an upload. None if it is completed already, from the same parts.

    Where the whole will lie is noted before it is sent: of whoever dies before `complete`, nothing stays that a sweep misses.
    Raises NotFound, Conflict, and BadRequest for parts that are not the upload's, or not all of it.
    """
    upload = get(session, caller, upload_id)
    if _is_completed_from(upload, part_ids):
        return None
    _require_pending(upload)
    parts = _named(session, upload, part_ids)
    file_id = ids.new("file-")
    upload.tried_file_ids = [*upload.tried_file_ids, file_id]
    upload.sweep_at = upload.expires_at + ASSEMBLING
    pieces = tuple(Piece(part.id, part.storage_key, part.sha256) for part in parts)
    return Plan(upload_id, part_ids, file_id, files.key_for(caller, file_id), pieces)


def complete(session: orm.Session, caller: Caller, made: Plan, *, stored: Stored) -> None:
    """The whole is in storage: make a file of it. Of two who put the same parts together the first one's becomes the file.

    Raises NotFound, Conflict if the upload has ended otherwise.
    """
    upload = get(session, caller, made.upload_id)
    if _is_completed_from(upload, made.part_ids):
        return
    _require_pending(upload)
    files.add(
        session,
        caller,
        file_id=made.file_id,
        filename=upload.filename,
        purpose=upload.purpose,
        stored=stored,
        expires_after_seconds=upload.file_expires_after_seconds,
    )
    upload.file_id, upload.part_ids = made.file_id, made.part_ids
    _end(session, upload, UploadStatus.COMPLETED)


def forget_part(session: orm.Session, caller: Caller, made: Plan, *, piece: Piece) -> Conflict | None:
    """Storage does not hold what was sent: it may be sent again, as if it had never come. Returns what to tell the client.

    If the upload has ended meanwhile, its parts are gone because of that: None if it was completed from the same ones.
    Raises NotFound, Conflict if it has ended otherwise.
    """
    upload = get(session, caller, made.upload_id)
    if _is_completed_from(upload, made.part_ids):
        return None
    _require_pending(upload)
    lost = delete(UploadPart).where(UploadPart.upload_id == upload.id, UploadPart.storage_key == piece.key)
    sizes = session.scalars(lost.returning(UploadPart.size_bytes)).all()
    upload.received_bytes -= sizes[0] if sizes else 0
    outbox.put(session, outbox.Topic.PURGE, {"prefix": piece.key})
    message = f"storage lost the part {piece.part_id}: send its bytes again, and complete the upload with the new part's id"
    return Conflict(message, param="part_ids", code="part_damaged")


def cancel(session: orm.Session, caller: Caller, upload_id: str) -> UploadOut:
    """Give an upload up; twice is the same as once. Raises NotFound, Conflict if it has ended otherwise."""
    upload = get(session, caller, upload_id)
    if upload.status != UploadStatus.CANCELLED:
        _require_pending(upload)
        _end(session, upload, UploadStatus.CANCELLED)
    return UploadOut.of(upload)


def sweep(session: orm.Session) -> int:
    """End some of the uploads whose time is over, and forget some that ended a day ago. Returns how many."""
    is_over = Upload.sweep_at <= func.clock_timestamp()
    first = select(Upload).where(is_over).order_by(Upload.sweep_at).limit(100).with_for_update(skip_locked=True)
    over = session.scalars(first).all()
    for upload in over:
        if upload.status == UploadStatus.PENDING:
            _end(session, upload, UploadStatus.EXPIRED)
        else:
            _purge(session, upload)
            session.delete(upload)
    return len(over)


def _require_open(session: orm.Session, upload: Upload) -> None:
    """Raises Conflict, also in the time that is left for putting together what came in time."""
    _require_pending(upload)
    if session.scalar(select(func.clock_timestamp() >= upload.expires_at)):
        raise _ended(upload, UploadStatus.EXPIRED)


def _require_pending(upload: Upload) -> None:
    if upload.status != UploadStatus.PENDING:
        raise _ended(upload, UploadStatus(upload.status))


def _ended(upload: Upload, status: UploadStatus) -> Conflict:
    became = f" and became {upload.file_id}" if status == UploadStatus.COMPLETED else ""
    message = f"{upload.id} is {status}{became}: nothing can be done with it any more; create another"
    return Conflict(message, param="upload_id", code=f"upload_{status}")


def _require_room(upload: Upload, more_bytes: int) -> None:
    room = upload.size_bytes - upload.received_bytes
    if more_bytes > room:
        message = (
            f"the part has {more_bytes} bytes, and {upload.id} lacks {room} of the {upload.size_bytes} it was created for: "
            "create an upload with the file's true size"
        )
        raise BadRequest(message, param="data", code="upload_size_exceeded")


def _count_parts(session: orm.Session, upload: Upload) -> int:
    return session.scalars(select(func.count()).select_from(UploadPart).where(UploadPart.upload_id == upload.id)).one()


def _find_same(session: orm.Session, upload: Upload, stored: Stored) -> str | None:
    """Where the upload has these bytes already."""
    same = UploadPart.sha256 == stored.sha256, UploadPart.size_bytes == stored.size_bytes
    return session.scalar(select(UploadPart.storage_key).where(UploadPart.upload_id == upload.id, *same).limit(1))


def _named(session: orm.Session, upload: Upload, part_ids: list[str]) -> list[UploadPart]:
    """The parts in this order. Raises BadRequest unless each is the upload's and named once, and together they are the file."""
    known = {part.id: part for part in list_parts(session, upload)}
    if unknown := next((part_id for part_id in part_ids if part_id not in known), None):
        message = f"{unknown!r} is no part of {upload.id}; GET /v1/uploads/{upload.id} lists its parts"
        raise BadRequest(message, param="part_ids", code="unknown_part")
    [(most_named, times)] = Counter(part_ids).most_common(1)
    if times > 1:
        raise BadRequest(f"{most_named} is named {times} times; name each part once", param="part_ids", code="part_repeated")
    total = sum(known[part_id].size_bytes for part_id in part_ids)
    if total != upload.size_bytes:
        message = f"these parts have {total} bytes, and {upload.id} was created for {upload.size_bytes}: name all parts, in order"
        raise BadRequest(message, param="part_ids", code="upload_size_mismatch")
    return [known[part_id] for part_id in part_ids]


def _is_completed_from(upload: Upload, part_ids: list[str]) -> bool:
    return upload.status == UploadStatus.COMPLETED and upload.part_ids == part_ids


def _end(session: orm.Session, upload: Upload, status: UploadStatus) -> None:
    upload.status, upload.sweep_at = status, func.clock_timestamp() + REMEMBERED
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload.id))
    _purge(session, upload)


def _purge(session: orm.Session, upload: Upload) -> None:
    """All but what became the file."""
    outbox.put(session, outbox.Topic.PURGE, {"prefix": _prefix(upload)})
    for file_id in upload.tried_file_ids:
        if file_id != upload.file_id:
            outbox.put(session, outbox.Topic.PURGE, {"prefix": files.key_for(upload, file_id)})


def _prefix(upload: Upload) -> str:
    return f"orgs/{upload.organization_id}/uploads/{upload.id}/"
