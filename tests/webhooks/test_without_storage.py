"""Storage hangs: it takes connections and says nothing. Whoever waits for a webhook does not wait for that."""

import socket
import time
from datetime import timedelta

from sqlalchemy import delete, func, orm, select, update

from app import outbox
from app.accounts.caller import Caller
from app.core.settings import Settings
from app.models import OutboxMessage
from app.outbox import Topic
from tests.embedded.patience import eventually
from tests.webhooks.receiver import Receiver
from tests.webhooks.steps import LOOPBACK, emit_event, make_endpoint, relay_process

DELETIONS = 100
GIVEN_UP_SECONDS = 30.0  # which is when the first deletion lets its place go


def test_storage_that_hangs_delays_no_webhook(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], organization: Caller, receiver: Receiver
) -> None:
    with system_sessions.begin() as session:
        later = func.clock_timestamp() + timedelta(hours=1)
        session.execute(update(OutboxMessage).values(not_before=later))  # what other tests left
        for n in range(DELETIONS):
            outbox.put(session, Topic.PURGE, {"prefix": f"orgs/none/{n}/"})
    make_endpoint(system_sessions, organization, receiver.url)
    with socket.create_server(("127.0.0.1", 0), backlog=DELETIONS) as silent:
        storage = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        with relay_process(settings.model_copy(update={"storage": storage, "webhooks": LOOPBACK})):  # it also ends in time
            eventually(lambda: _tried(system_sessions))
            emit_event(system_sessions, organization)
            began_at = time.monotonic()
            eventually(lambda: receiver.received)
            assert time.monotonic() - began_at < GIVEN_UP_SECONDS
    with system_sessions.begin() as session:
        session.execute(delete(OutboxMessage).where(OutboxMessage.topic == Topic.PURGE))


def _tried(sessions: orm.sessionmaker[orm.Session]) -> int:
    with sessions.begin() as session:
        tried = select(func.count()).where(OutboxMessage.topic == Topic.PURGE, OutboxMessage.attempts > 0)
        return session.scalars(tried).one()
