"""What was worked out from a file's bytes and would come out the same again: kept, so that it is worked out once.

An entry belongs to an organization, and lives as long as one of its files has these bytes and somebody asks for it every month.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, orm, select

from app import db, outbox
from app.core import ids
from app.models import Derived, File, Job
from app.models.jobs import UNFINISHED

UNUSED, ABANDONED = timedelta(days=30), timedelta(days=1)


@dataclass(frozen=True)
class Known:
    """A whole entry. `storage_key` and `sha256` are those of its object, if it has one."""

    id: str
    storage_key: str | None
    sha256: str | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Begun:
    """An entry whose object is being sent."""

    id: str
    organization_id: str
    key: str
    file_sha256: str
    storage_key: str


def find(session: orm.Session, organization_id: str, keys: Collection[str]) -> dict[str, Known]:
    """Those of the keys that are known. They stay for another month."""
    entries = session.scalars(
        select(Derived)
        .where(Derived.organization_id == organization_id, Derived.key.in_(keys), Derived.facts.is_not(None))
        .order_by(Derived.id)  # so that two who ask for the same do not wait for each other
        .with_for_update()
    ).all()
    for entry in entries:
        entry.last_used_at = func.clock_timestamp()
    return {entry.key: _known(entry) for entry in entries}


def look_up(session: orm.Session, organization_id: str, keys: Collection[str]) -> dict[str, Known]:
    """The same for who only wants to know: nothing stays longer for it."""
    asked = Derived.organization_id == organization_id, Derived.key.in_(keys), Derived.facts.is_not(None)
    return {entry.key: _known(entry) for entry in session.scalars(select(Derived).where(*asked))}


def begin(session: orm.Session, organization_id: str, *, key: str, file_sha256: str) -> Begun:
    """Make room for an object before its bytes are sent: if their maker dies, `sweep` finds them."""
    entry_id = ids.new("drv-")
    storage_key = f"orgs/{organization_id}/datasets/{entry_id}.safetensors"
    session.add(Derived(id=entry_id, organization_id=organization_id, key=key, file_sha256=file_sha256, storage_key=storage_key))
    return Begun(entry_id, organization_id, key, file_sha256, storage_key)


def finish(session: orm.Session, made: Begun, *, sha256: str, facts: dict[str, Any]) -> Known | None:
    """The object is in storage. Returns the entry that holds from now on: of two makers, the first one's.

    None if the file was deleted meanwhile, and with it the entry; the object goes too.
    """
    is_held = _is_held(session, made.organization_id, made.file_sha256)  # locked in the order in which `forget` locks
    first = _whole(session, made.organization_id, made.key)
    if first is not None and first.id != made.id:
        _remove(session, Derived.id == made.id)
        return _known(first)
    entry = session.scalar(select(Derived).where(Derived.id == made.id).with_for_update())
    if entry is None or not is_held:
        session.execute(delete(Derived).where(Derived.id == made.id))
        outbox.put(session, outbox.Topic.PURGE, {"prefix": made.storage_key})
        return None
    entry.sha256, entry.facts = sha256, facts
    return _known(entry)


def remember(session: orm.Session, organization_id: str, *, key: str, file_sha256: str, facts: dict[str, Any]) -> None:
    """Keep what needs no object, unless the file is gone."""
    if _is_held(session, organization_id, file_sha256) and _whole(session, organization_id, key) is None:
        session.add(Derived(id=ids.new("drv-"), organization_id=organization_id, key=key, file_sha256=file_sha256, facts=facts))


def forget(session: orm.Session, organization_id: str, file_sha256: str) -> None:
    """A file is gone. So is what came of it, unless another file of the organization has the same bytes."""
    same = select(File.id).where(File.organization_id == organization_id, File.sha256 == file_sha256)
    if session.scalar(same.limit(1)) is None:
        _remove(session, and_(Derived.organization_id == organization_id, Derived.file_sha256 == file_sha256))


def sweep(session: orm.Session) -> int:
    """Remove some of what nobody has asked for in a month and no unfinished job trains on, and of what its maker never finished.
    Returns how much."""
    now = func.clock_timestamp()
    is_read = or_(
        Job.datasets["training"]["key"].astext == Derived.storage_key,
        Job.datasets["validation"]["key"].astext == Derived.storage_key,
    )
    readers = select(Job.id).where(Job.organization_id == Derived.organization_id, Job.state.in_(UNFINISHED), is_read)
    unused, abandoned = Derived.last_used_at < now - UNUSED, and_(Derived.facts.is_(None), Derived.created_at < now - ABANDONED)
    removed = 0
    for is_over in (unused, abandoned):  # each has an index
        over = select(Derived.id).where(is_over, ~readers.exists())
        removed += _remove(session, Derived.id.in_(over.limit(100).with_for_update(skip_locked=True)))
    return removed


def _is_held(session: orm.Session, organization_id: str, file_sha256: str) -> bool:
    """Whether a file of the organization has these bytes; it then keeps them until the commit."""
    holder = select(File.id).where(File.organization_id == organization_id, File.sha256 == file_sha256)
    return session.scalar(holder.limit(1).with_for_update(read=True)) is not None


def _whole(session: orm.Session, organization_id: str, key: str) -> Derived | None:
    """The entry of a key, which nobody else finishes before this transaction ends."""
    db.take_turns(session, organization_id + key)
    return session.scalar(
        select(Derived).where(Derived.organization_id == organization_id, Derived.key == key, Derived.facts.is_not(None))
    )


def _remove(session: orm.Session, which: ColumnElement[bool]) -> int:
    """The rows, and after the commit their objects: each was made for one row and is no other's. Returns how many."""
    gone = delete(Derived).where(which).returning(Derived.storage_key).execution_options(synchronize_session=False)
    storage_keys = session.scalars(gone).all()
    for storage_key in filter(None, storage_keys):
        outbox.put(session, outbox.Topic.PURGE, {"prefix": storage_key})
    return len(storage_keys)


def _known(entry: Derived) -> Known:
    assert entry.facts is not None
    return Known(entry.id, entry.storage_key, entry.sha256, entry.facts)
