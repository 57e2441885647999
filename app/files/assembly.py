"""The parts of an upload become one object: read once in their order, checked, and sent on as they come.

Memory holds a chunk and a part of S3's, whatever the size of the file (docs/decisions/0024).
"""

import asyncio
import hashlib
from asyncio import Task
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread
from sqlalchemy import orm
from starlette.concurrency import run_in_threadpool

from app import db
from app.accounts.caller import Caller
from app.core import crash
from app.core.errors import BadRequest, NotFound, RateLimited
from app.core.storage import Storage, Stored
from app.files import uploads
from app.files.settling import settling, throw_away
from app.files.upload_schemas import UploadComplete, UploadOut
from app.files.uploads import Piece, Plan

AT_ONCE: Final = 4
MOST_ASKED: Final = 16  # by an organization, at a time


class TooManyCompletions(RateLimited):
    code = "too_many_completions"
    retry_after_seconds = 10


@dataclass(frozen=True)
class Assembler:
    """Completes uploads, one of an organization after the other, so that none keeps the others waiting.

    Each takes a thread and a while, and a few at once take turns; no transaction is open meanwhile.
    """

    sessions: orm.sessionmaker[orm.Session]
    storage: Storage
    _turns: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(AT_ONCE))
    _lines: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)  # one of each organization
    _under_way: dict[tuple[str | None, ...], "Task[UploadOut]"] = field(default_factory=dict)

    async def complete(self, caller: Caller, upload_id: str, request: UploadComplete) -> UploadOut:
        """The same answer however often it is asked: who asks again because a proxy lost patience waits for the first one's.

        Raises NotFound, Conflict, BadRequest, Unavailable, TooManyCompletions.
        """
        asked = (caller.organization_id, caller.project_id, upload_id, *request.part_ids, request.md5)
        task = self._under_way.get(asked)
        if task is None:
            self._require_few(caller)
            task = self._under_way[asked] = asyncio.create_task(self._complete(caller, upload_id, request))
            task.add_done_callback(lambda _: self._under_way.pop(asked))
        return await asyncio.shield(task)

    def _require_few(self, caller: Caller) -> None:
        if sum(asked[0] == caller.organization_id for asked in self._under_way) >= MOST_ASKED:
            raise TooManyCompletions(f"{MOST_ASKED} uploads of yours are being completed; try again when one of them is")

    async def _complete(self, caller: Caller, upload_id: str, request: UploadComplete) -> UploadOut:
        plan = await run_in_threadpool(self._plan, caller, upload_id, request)
        if isinstance(plan, UploadOut):
            return plan
        line = self._lines.setdefault(caller.organization_id, asyncio.Lock())
        async with line:  # planned before, since an upload must not expire here
            return await to_thread.run_sync(self._carry_out, caller, plan, request.md5, limiter=self._turns)

    def _plan(self, caller: Caller, upload_id: str, request: UploadComplete) -> Plan | UploadOut:
        with db.organization_session(self.sessions, caller.organization_id) as session:
            plan = uploads.plan(session, caller, upload_id, part_ids=request.part_ids)
            return plan or uploads.show(session, caller, upload_id)

    def _carry_out(self, caller: Caller, plan: Plan, md5: str | None) -> UploadOut:
        try:
            stored = assemble(self.storage, plan, md5=md5)
        except PartLost as lost:
            return self._answer_loss(caller, plan, lost.piece)
        crash.point("upload_assembled")
        with settling(self.storage, plan.key):
            shown = self._make_known(caller, plan, stored)
        if shown.file is None or shown.file.id != plan.file_id:  # another process was sooner
            throw_away(self.storage, plan.key)
        return shown

    def _make_known(self, caller: Caller, plan: Plan, stored: Stored) -> UploadOut:
        with db.organization_session(self.sessions, caller.organization_id) as session:
            uploads.complete(session, caller, plan, stored=stored)
            return uploads.show(session, caller, plan.upload_id)

    def _answer_loss(self, caller: Caller, plan: Plan, piece: Piece) -> UploadOut:
        """Parts are gone because the upload has ended meanwhile, or because storage lost them. Raises Conflict."""
        with db.organization_session(self.sessions, caller.organization_id) as session:
            error = uploads.forget_part(session, caller, plan, piece=piece)
            if error is None:
                return uploads.show(session, caller, plan.upload_id)
        raise error  # once the loss is committed


class PartLost(Exception):
    """Storage has no such part, or other bytes."""

    def __init__(self, piece: Piece) -> None:
        super().__init__(piece.part_id)
        self.piece = piece


def assemble(storage: Storage, plan: Plan, *, md5: str | None) -> Stored:
    """Put the pieces together under the plan's key. Raises PartLost, BadRequest for another md5; then nothing is stored."""
    whole = hashlib.md5(usedforsecurity=False)
    with storage.upload(plan.key) as upload:
        for piece in plan.pieces:
            for chunk in _read(storage, piece):
                upload.write(chunk)
                if md5 is not None:
                    whole.update(chunk)
        if md5 is not None and whole.hexdigest() != md5.lower():
            message = f"the md5 of these parts is {whole.hexdigest()}: name them in the file's order, or send them again"
            raise BadRequest(message, param="md5", code="md5_mismatch")
        return upload.finish()


def _read(storage: Storage, piece: Piece) -> Iterator[bytes]:
    """The bytes of a part. Raises PartLost, at their end if they are not those that were sent."""
    digest = hashlib.sha256()
    try:
        for chunk in storage.stream(piece.key):
            digest.update(chunk)
            yield chunk
    except NotFound:
        raise PartLost(piece) from None
    if digest.hexdigest() != piece.sha256:
        raise PartLost(piece)
