from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import orm
from starlette.concurrency import run_in_threadpool

from app import db, pages
from app.core import crash, ids
from app.deps import Caller, Session, Storage
from app.files import multipart
from app.files import service as files
from app.files.schemas import FileDeleted, FileOut, UploadFields
from app.files.settling import settle
from app.idempotency import IdempotentRoute

router = APIRouter(prefix="/v1", tags=["Files"], route_class=IdempotentRoute)


@router.post("/files", openapi_extra=multipart.documented("file", "purpose"))
async def upload_file(request: Request, caller: Caller, storage: Storage) -> FileOut:
    """Upload a file to train on, or to evaluate with. It is validated at once; `status` says how that ends."""
    file_id = ids.new("file-")
    key = files.key_for(caller, file_id)
    await run_in_threadpool(_promise, request, caller, file_id)
    received = await multipart.receive(request.stream(), request.headers.get("content-type", ""), storage, key)
    crash.point("upload_stored")
    add = partial(_add, caller=caller, file_id=file_id, received=received)
    return await run_in_threadpool(settle, request, caller, key, received, add)


def _promise(request: Request, caller: Caller, file_id: str) -> None:
    with db.organization_session(request.app.state.sessions, caller.organization_id) as session:
        files.promise(session, caller, file_id)


def _add(session: orm.Session, *, caller: Caller, file_id: str, received: multipart.Received) -> FileOut:
    fields = UploadFields.parse(received.fields)
    file = files.add(
        session,
        caller,
        file_id=file_id,
        filename=received.filename,
        purpose=fields.purpose,
        stored=received.stored,
        expires_after_seconds=fields.expires_after_seconds,
    )
    return FileOut.of(file)


@router.get("/files")
def list_files(
    session: Session,
    caller: Caller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 10_000,
    order: pages.Order = "desc",
    purpose: str | None = None,
) -> pages.Page[FileOut]:
    """Your files, newest first."""
    found = files.list_page(session, caller, purpose=purpose, after=after, limit=limit, order=order)
    return pages.page(found, partial(FileOut.of, is_listed=True))


@router.get("/files/{file_id}")
def get_file(file_id: str, session: Session, caller: Caller) -> FileOut:
    """One file, with its validation report."""
    return FileOut.of(files.get(session, caller, file_id))


@router.delete("/files/{file_id}")
def delete_file(file_id: str, session: Session, caller: Caller) -> FileDeleted:
    """Delete a file that no job needs any more."""
    return FileDeleted(id=files.delete(session, caller, file_id))


@router.get("/files/{file_id}/content", response_class=StreamingResponse)
def get_file_content(file_id: str, session: Session, caller: Caller, storage: Storage) -> StreamingResponse:
    """The bytes of a file, as they were uploaded."""
    file = files.get(session, caller, file_id)
    return StreamingResponse(storage.stream(file.storage_key), media_type="application/octet-stream")
