"""The relay is told to go while a receiver is taking a message: it hears the answer out, and takes nothing new in hand."""

import threading
from http.server import BaseHTTPRequestHandler

from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core.settings import Settings
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.webhooks.receiver import Receiver, answering
from tests.webhooks.steps import LOOPBACK, emit_event, make_endpoint, relay_process, rows_of


def test_a_message_on_its_way_is_settled_before_the_relay_is_gone(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], organization: Caller, receiver: Receiver
) -> None:
    may_answer = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert may_answer.wait(PATIENCE_SECONDS)
        answering(200)(handler)

    receiver.answer = answer
    make_endpoint(system_sessions, organization, receiver.url)
    emit_event(system_sessions, organization, data_id="ftjob-taken")
    with relay_process(settings.model_copy(update={"webhooks": LOOPBACK})) as relay:
        eventually(lambda: receiver.received)
        relay.terminate()
        emit_event(system_sessions, organization, data_id="ftjob-late")
        threading.Timer(2, may_answer.set).start()
        assert relay.wait(PATIENCE_SECONDS) == 0

    taken, late = rows_of(system_sessions, organization)
    assert (taken.attempts, taken.delivered_at is None, taken.lease_expires_at) == (1, False, None)
    assert (late.attempts, late.lease_expires_at) == (0, None)
    assert len(receiver.received) == 1
