"""What the stories about webhooks are made of."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, func, orm, select, update

from app import db
from app.accounts.caller import Caller
from app.core.settings import Settings, WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import delivery, delivery_log, sending
from app.webhooks import service as webhooks
from app.webhooks.emit import EventType, emit
from app.webhooks.schemas import EndpointCreate, EndpointUpdate
from tests.embedded.patience import PATIENCE_SECONDS
from worker.embedded import environment

Sessions = orm.sessionmaker[orm.Session]

LOOPBACK = WebhookSettings(allow_loopback=True)
PATIENT = LOOPBACK.model_copy(update={"timeout_seconds": PATIENCE_SECONDS})  # gives no receiver up while a test lasts
SECRETS = ("DATABASE__SYSTEM_URL", "STORAGE", "BROKER_URL", "ENGINE_TOKEN")
HASTY = WebhookSettings(allow_loopback=True, timeout_seconds=0.5)


def make_endpoint(sessions: Sessions, caller: Caller, url: str, *types: EventType) -> WebhookEndpoint:
    with sessions.begin() as session:
        db.use_organization(session, caller.organization_id)
        request = EndpointCreate(url=url, event_types=list(types or EventType))
        return webhooks.create(session, caller, request=request, settings=LOOPBACK)


def update_endpoint(sessions: Sessions, caller: Caller, endpoint_id: str, **changes: Any) -> None:
    with db.organization_session(sessions, caller.organization_id) as session:
        webhooks.update(session, caller, endpoint_id, request=EndpointUpdate(**changes), settings=LOOPBACK)


def endpoint_of(sessions: Sessions, endpoint_id: str) -> WebhookEndpoint:
    with sessions.begin() as session:
        return session.get_one(WebhookEndpoint, endpoint_id)


def emit_event(sessions: Sessions, caller: Caller, type: EventType = EventType.SUCCEEDED, *, data_id: str = "ftjob-1") -> None:
    with sessions.begin() as session:
        db.use_organization(session, caller.organization_id)
        emit(session, organization_id=caller.organization_id, project_id=caller.project_id, type=type, data_id=data_id)


def deliver(
    sessions: Sessions, settings: WebhookSettings = LOOPBACK, *, is_leaving: Callable[[], bool] = lambda: False, **how: Any
) -> int:
    """What the relay does when it wakes up. Returns how many attempts were made."""

    async def run() -> int:
        async with sending.open_client(settings, **how) as client:
            return await delivery.deliver_due(sessions, client, settings, is_leaving=is_leaving)

    return asyncio.run(run())


@contextmanager
def relaying(sessions: Sessions, settings: WebhookSettings = LOOPBACK) -> Iterator[None]:
    """A relay at work until the end of the block, which is the end of it: what is in flight then is left to its lease."""
    stopped = threading.Event()

    async def work(client: sending.Client) -> None:
        while True:
            await delivery.deliver_due(sessions, client, settings)
            await asyncio.sleep(0.02)

    async def run() -> None:
        async with sending.open_client(settings) as client:
            relay = asyncio.create_task(work(client))
            await asyncio.to_thread(stopped.wait)
            relay.cancel()
            await asyncio.wait([relay])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def relay_process(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """The relay as it is deployed, until the end of the block, which it must end well."""
    relay = subprocess.Popen([sys.executable, "-m", "worker.relay"], env=environment.of(settings, secrets=SECRETS))
    try:
        yield relay
    finally:
        relay.terminate()
        assert relay.wait(timeout=PATIENCE_SECONDS) == 0


def rows_of(sessions: Sessions, caller: Caller) -> list[WebhookDelivery]:
    with sessions.begin() as session:
        mine = select(WebhookDelivery).where(WebhookDelivery.organization_id == caller.organization_id)
        return list(session.scalars(mine.order_by(WebhookDelivery.id)))


def change(sessions: Sessions, caller: Caller, **values: Any) -> None:
    with sessions.begin() as session:
        mine = update(WebhookDelivery).where(WebhookDelivery.organization_id == caller.organization_id)
        session.execute(mine.values(**values))


def change_endpoints(sessions: Sessions, caller: Caller, **values: Any) -> None:
    with sessions.begin() as session:
        mine = update(WebhookEndpoint).where(WebhookEndpoint.organization_id == caller.organization_id)
        session.execute(mine.values(**values))


def age(sessions: Sessions, caller: Caller) -> None:
    """Let the time pass until the next attempt, if there is to be one: leases run out, and endpoints have rested."""
    past = func.clock_timestamp() - timedelta(milliseconds=1)
    when_waiting = case((WebhookDelivery.next_attempt_at.is_not(None), past))
    change(sessions, caller, next_attempt_at=when_waiting, lease_expires_at=past)
    change_endpoints(sessions, caller, not_before=past)


def remove_deleted(sessions: Sessions) -> None:
    """What the relay does with endpoints that are deleted."""
    with sessions.begin() as session:
        while delivery_log.remove_deleted(session):
            pass


def seconds_until(sessions: Sessions, instant: datetime | None) -> float:
    assert instant is not None
    with sessions.begin() as session:
        return (instant - session.scalars(select(func.clock_timestamp())).one()).total_seconds()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
