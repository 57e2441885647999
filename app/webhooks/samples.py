"""A sample of an event, sent to an endpoint by the API itself. It is in no queue and no log of deliveries."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import orm, select
from starlette.concurrency import run_in_threadpool

from app import db
from app.accounts.caller import Caller
from app.core import ids
from app.core.errors import RateLimited
from app.core.settings import WebhookSettings
from app.models import WebhookEndpoint
from app.webhooks import emit, rotation, sending
from app.webhooks import service as endpoints
from app.webhooks.emit import EventType

DATA_ID = "sample"


class SampleInFlight(RateLimited):
    code = "webhook_sample_in_flight"


class Sampler:
    """Sends one sample at a time to an endpoint, so that receivers which let us wait take few of the API's connections."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], client: sending.Client, settings: WebhookSettings) -> None:
        self._sessions, self._client, self._settings = sessions, client, settings
        self._in_flight = set[tuple[str, str]]()

    async def send(self, caller: Caller, endpoint_id: str, event_type: EventType) -> sending.Outcome:
        """Tell an endpoint, enabled or not, of an event that never happened. Raises SampleInFlight."""
        with self._alone(caller, endpoint_id):
            message = await run_in_threadpool(self._message, caller, endpoint_id, event_type)
            return await sending.send(self._client, self._settings, message)

    @contextmanager
    def _alone(self, caller: Caller, endpoint_id: str) -> Iterator[None]:
        key = (caller.project_id, endpoint_id)  # whoever names a stranger's endpoint keeps nobody from it
        if key in self._in_flight:
            raise SampleInFlight(f"a sample is on its way to {endpoint_id!r}; send the next one when this one is answered")
        self._in_flight.add(key)
        try:
            yield
        finally:
            self._in_flight.remove(key)

    def _message(self, caller: Caller, endpoint_id: str, event_type: EventType) -> sending.Message:
        with db.organization_session(self._sessions, caller.organization_id) as session:
            endpoint = endpoints.get(session, caller, endpoint_id)
            secrets = session.execute(select(*rotation.valid_secrets()).where(WebhookEndpoint.id == endpoint.id)).one()
        body = emit.body_of(ids.new("evt_"), event_type, data={"id": DATA_ID})
        return sending.Message(ids.new("msg_"), endpoint.url, tuple(filter(None, secrets)), body.encode())
