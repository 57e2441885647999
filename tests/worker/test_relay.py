"""What the relay does in a moment that no test of the whole process can choose."""

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from openai import OpenAI
from sqlalchemy import delete, func, orm, select, text, update
from sqlalchemy.exc import OperationalError

from app import backups, db, idempotency
from app import outbox as messages
from app.accounts.caller import Caller
from app.core import catalog
from app.core.settings import Settings
from app.core.storage import Storage
from app.models import IdempotentAnswer, OutboxMessage
from app.outbox import Topic
from worker.embedded import Servers
from worker.embedded.roles import DATABASE
from worker.outbox import BATCH, MAX_PREFETCHES, Outbox
from worker.relay import Relay, woken_or_late
from worker.services import Services


@pytest.mark.parametrize("turns", range(4))
def test_a_stop_that_comes_with_a_notification_is_heard(turns: int) -> None:
    """The event first, the stop some turns of the loop later: in one of them the waiter has been woken and has not run yet."""

    async def wake_and_stop() -> None:
        waker = asyncio.Event()

        async def repeat() -> None:
            while True:
                waker.clear()
                await woken_or_late(waker, 60)

        waiting = asyncio.create_task(repeat())
        await asyncio.sleep(0.01)
        waker.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=1)
        assert waiting.cancelled()

    asyncio.run(wake_and_stop())


def test_a_wait_ends_by_itself() -> None:
    asyncio.run(woken_or_late(asyncio.Event(), 0.01))


def test_objects_outlive_their_rows_for_as_long_as_a_backup_is_made(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, client: OpenAI, organization: Caller
) -> None:
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
    key = f"orgs/{organization.organization_id}/files/{file.id}"
    client.files.delete(file.id)

    relay = Relay(Services(settings, system_sessions, storage, catalog.load()))

    async def act() -> None:
        """What the relay does in its own time, done now."""
        with system_sessions.begin() as session:
            session.execute(update(OutboxMessage).values(not_before=func.clock_timestamp()))
        while await relay.outbox.free_storage() == 0.0:  # what other tests have left comes first
            pass

    with system_sessions.begin() as backup:
        backup.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": backups.LOCK})
        asyncio.run(act())
        assert storage.exists(key)
        backup.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": backups.LOCK})
    asyncio.run(act())
    assert not storage.exists(key)


@pytest.fixture
def outbox(settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage) -> Iterator[Outbox]:
    """Over a table that holds nothing but what the test puts there."""
    with system_sessions.begin() as session:
        session.execute(delete(OutboxMessage))
    yield Relay(Services(settings, system_sessions, storage, catalog.load())).outbox
    with system_sessions.begin() as session:
        session.execute(delete(OutboxMessage))


def put(sessions: orm.sessionmaker[orm.Session], topic: Topic, *payloads: dict[str, Any]) -> None:
    with sessions.begin() as session:
        for payload in payloads:
            messages.put(session, topic, payload)


def left(sessions: orm.sessionmaker[orm.Session]) -> list[OutboxMessage]:
    with sessions.begin() as session:
        return list(session.scalars(select(OutboxMessage).order_by(OutboxMessage.id)))


def now(sessions: orm.sessionmaker[orm.Session]) -> datetime:
    with sessions.begin() as session:
        return session.scalars(select(func.clock_timestamp())).one()


def make_due(sessions: orm.sessionmaker[orm.Session], later: timedelta = timedelta()) -> None:
    with sessions.begin() as session:
        session.execute(update(OutboxMessage).values(not_before=func.clock_timestamp() + later))


def tell(outbox: Outbox) -> float:
    async def run() -> float:
        async with httpx.AsyncClient() as engines:
            return await outbox.tell(engines)

    return asyncio.run(run())


def test_a_ring_passes_all_else_that_waits(outbox: Outbox, system_sessions: orm.sessionmaker[orm.Session]) -> None:
    put(system_sessions, Topic.PURGE, *({"prefix": f"orgs/none/{n}/"} for n in range(BATCH)))
    put(system_sessions, Topic.PREFETCH, *({"unreadable": n} for n in range(BATCH)))
    put(system_sessions, Topic.RING, {"queue": "cpu", "trace": None})

    assert tell(outbox) == 0.0  # a full batch: there may be more
    assert {message.topic for message in left(system_sessions)} == {Topic.PURGE, Topic.PREFETCH}


def test_what_fails_is_tried_ever_more_seldom_and_holds_up_nothing_behind_it(
    outbox: Outbox, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    unreadable = [{"unreadable": n} for n in range(BATCH)]
    put(system_sessions, Topic.PREFETCH, *unreadable)
    began_at = now(system_sessions)
    assert tell(outbox) == 0.0
    assert all(message.not_before >= began_at + timedelta(seconds=5) for message in left(system_sessions))
    make_due(system_sessions, timedelta(hours=1))
    put(system_sessions, Topic.PREFETCH, {"unreadable": "later"})
    assert tell(outbox) > 0.0  # the first ones are not due, and nobody spins
    assert [message.attempts for message in left(system_sessions)] == [1] * (BATCH + 1)

    for n in range(1, MAX_PREFETCHES - 1):
        make_due(system_sessions)
        before = now(system_sessions)
        while any(message.attempts == n for message in left(system_sessions)):
            tell(outbox)
        after, pause = now(system_sessions), timedelta(seconds=5 * 2**n)
        assert all(before + pause <= message.not_before <= after + pause for message in left(system_sessions))
    make_due(system_sessions)
    while tell(outbox) == 0.0:
        pass
    assert left(system_sessions) == []  # at last they are given up


def test_a_relay_that_leaves_deletes_no_further(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, organization: Caller
) -> None:
    prefix = f"orgs/{organization.organization_id}/files/file-1/"
    storage.put(f"{prefix}a", b"a")
    with system_sessions.begin() as session:
        session.execute(delete(OutboxMessage))
    put(system_sessions, Topic.PURGE, {"prefix": prefix})
    relay = Relay(Services(settings, system_sessions, storage, catalog.load()))
    relay.leave()
    asyncio.run(relay.outbox.free_storage())
    assert list(storage.list_keys(prefix)) == [f"{prefix}a"]
    assert len(left(system_sessions)) == 1

    with system_sessions.begin() as session:
        session.execute(update(OutboxMessage).values(not_before=func.clock_timestamp()))
    asyncio.run(Relay(Services(settings, system_sessions, storage, catalog.load())).outbox.free_storage())
    assert list(storage.list_keys(prefix)) == []
    assert left(system_sessions) == []


def test_all_that_is_old_goes_at_once_and_what_cannot_go_keeps_the_rest_from_nothing(
    servers: Servers, settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, organization: Caller
) -> None:
    owner = {"org": organization.organization_id, "project": organization.project_id}
    with system_sessions.begin() as session:
        session.execute(
            text(
                "INSERT INTO idempotent_answers (id, organization_id, project_id, key, request_sha256, created_at)"
                " SELECT :org || n, :org, :project, n, '', now() - interval '25 hours' FROM generate_series(1, :many) AS n"
            ),
            owner | {"many": 2 * idempotency.MAX_EXPIRED + 1},
        )
    hasty = db.open_sessions(settings.database.system_url, statement_seconds=5)
    relay = Relay(Services(settings, hasty, storage, catalog.load()))
    with psycopg.connect(servers.superuser_dsn, dbname=DATABASE) as owner_of_files:
        owner_of_files.execute("LOCK TABLE files IN ACCESS EXCLUSIVE MODE")  # the first that is cleaned
        with pytest.raises(OperationalError):
            relay._remove_old()
    hasty.kw["bind"].dispose()
    with system_sessions.begin() as session:
        mine = IdempotentAnswer.organization_id == organization.organization_id
        assert session.scalars(select(func.count()).select_from(IdempotentAnswer).where(mine)).one() == 0
