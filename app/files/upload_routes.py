from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from sqlalchemy import orm
from starlette.concurrency import run_in_threadpool

from app import db
from app.core import crash
from app.deps import Caller, Session, Settings, Storage
from app.files import multipart, uploads
from app.files.assembly import Assembler
from app.files.multipart import Received, Wanted
from app.files.settling import settle
from app.files.upload_schemas import PartOut, UploadComplete, UploadCreate, UploadOut, UploadWithParts
from app.files.uploads import Place
from app.idempotency import IdempotentRoute

router = APIRouter(prefix="/v1/uploads", tags=["Uploads"], route_class=IdempotentRoute)


def get_assembler(request: Request) -> Assembler:
    assembler: Assembler = request.app.state.assembler
    return assembler


UploadAssembler = Annotated[Assembler, Depends(get_assembler)]


@router.post("")
def create_upload(body: UploadCreate, session: Session, caller: Caller, settings: Settings) -> UploadOut:
    """Begin to send a large file in parts. It has an hour."""
    return UploadOut.of(uploads.create(session, caller, request=body, limits=settings.limits))


@router.get("/{upload_id}")
def get_upload(upload_id: str, session: Session, caller: Caller) -> UploadWithParts:
    """One upload, with the parts that have come: a client that was interrupted goes on from there."""
    return uploads.show(session, caller, upload_id)


@router.post("/{upload_id}/parts", openapi_extra=multipart.documented("data"))
async def add_upload_part(upload_id: str, request: Request, caller: Caller, storage: Storage) -> PartOut:
    """Send a part of the file: several at once, in any order. The order is told when the upload is completed."""
    place = await run_in_threadpool(_place, request, caller, upload_id)
    wanted = Wanted("data", place.most_bytes, "send smaller parts, and no more than the upload was created for")
    content_type = request.headers.get("content-type", "")
    received = await multipart.receive(request.stream(), content_type, storage, place.key, wanted=wanted)
    crash.point("part_stored")
    add = partial(_add, caller=caller, upload_id=upload_id, place=place, received=received)
    return await run_in_threadpool(settle, request, caller, place.key, received, add)


def _place(request: Request, caller: Caller, upload_id: str) -> Place:
    """A transaction of its own: none is open while the bytes come in."""
    state = request.app.state
    with db.organization_session(state.sessions, caller.organization_id) as session:
        return uploads.place_part(session, caller, upload_id, limits=state.settings.limits)


def _add(session: orm.Session, *, caller: Caller, upload_id: str, place: Place, received: Received) -> PartOut:
    return PartOut.of(uploads.add_part(session, caller, upload_id, place=place, stored=received.stored))


@router.post("/{upload_id}/complete")
async def complete_upload(upload_id: str, body: UploadComplete, caller: Caller, assembler: UploadAssembler) -> UploadOut:
    """Make a file of the parts, in this order. Asked again with the same parts, it answers with the same file."""
    return await assembler.complete(caller, upload_id, body)


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, session: Session, caller: Caller) -> UploadOut:
    """Give an upload up: what has come is thrown away."""
    return uploads.cancel(session, caller, upload_id)
