"""Deliveries: each due row is claimed for a while, sent with no transaction open, and settled. At least once, same bytes."""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ssl import SSLContext

import httpcore
import httpx
import structlog
from sqlalchemy import func, orm, select, update

from app.core.settings import WebhookSettings
from app.models import WebhookDelivery, WebhookEndpoint
from app.webhooks import guard, signing

log = structlog.get_logger()

# the first attempt is made at once; after the last delay there is one more, and then none
RETRY_DELAYS = (
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=24),
)
MAX_IN_FLIGHT = 32
MAX_PER_ENDPOINT = 4
LOOK_AHEAD = 1000  # due rows among which turns are given, so that a claim costs the same however many wait
LOOK_SECONDS = 1.0  # how often to look for new rows while slow receivers are waited for
LEASE_MARGIN = timedelta(seconds=45)
CONNECT_SECONDS = 5.0  # for one address, so that a dead one leaves time for the next
MAX_ANSWER_BYTES = 64 * 1024
USER_AGENT = "Tunesmith-Webhooks/1"

Client = httpcore.AsyncConnectionPool


@dataclass(frozen=True)
class Message:
    """A delivery in our hands until its lease runs out. `attempts` counts those made before."""

    id: str
    organization_id: str
    endpoint_id: str
    attempts: int
    url: str
    secret: str
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """`error` is None when the receiver took the message."""

    status: int | None
    error: str | None


@asynccontextmanager
async def open_client(
    settings: WebhookSettings, *, resolve: guard.Resolve = guard.resolve, ssl_context: SSLContext | None = None
) -> AsyncIterator[Client]:
    """An HTTP client behind the address guard. It follows no redirect, knows no proxy and keeps no connection."""
    threads = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="resolve")
    network = guard.GuardedNetwork(settings, resolve, threads, httpcore.AnyIOBackend())
    try:
        async with httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(), max_keepalive_connections=0, network_backend=network
        ) as client:
            yield client
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def deliver_due(sessions: orm.sessionmaker[orm.Session], client: Client, settings: WebhookSettings) -> int:
    """Send messages until none is due, and return how many attempts that took.

    Endpoints take turns of a few messages, and one whose turn lasts long holds up nobody else. Cancelled or crashed, what
    was in flight is sent again when its lease runs out.
    """
    in_flight: dict[asyncio.Task[None], str] = {}
    attempts = 0
    try:
        while True:
            room, busy = MAX_IN_FLIGHT - len(in_flight), set(in_flight.values())
            claimed = await asyncio.to_thread(_claim, sessions, settings, room=room, busy=busy) if room else []
            for message in claimed:
                in_flight[asyncio.create_task(_attempt(sessions, client, settings, message))] = message.endpoint_id
            attempts += len(claimed)
            if not in_flight:
                return attempts
            done, _ = await asyncio.wait(in_flight, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del in_flight[task]
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)


def next_due_in(session: orm.Session) -> float | None:
    """Seconds until the next message is due, 0 if one is; None if none waits."""
    seconds = func.extract("epoch", WebhookDelivery.next_attempt_at - func.clock_timestamp())
    waiting = select(seconds).join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
    is_wanted = (WebhookEndpoint.is_enabled, WebhookDelivery.next_attempt_at.is_not(None))
    found = session.scalar(waiting.where(*is_wanted).order_by(WebhookDelivery.next_attempt_at).limit(1))
    return None if found is None else max(0.0, float(found))


def _claim(
    sessions: orm.sessionmaker[orm.Session], settings: WebhookSettings, *, room: int, busy: Collection[str]
) -> Sequence[Message]:
    """Take up to `room` due messages, a turn for each endpoint that is not busy, from before every other relay."""
    # the statement's time, since an index cannot answer for a clock that moves while it is read
    is_due = WebhookDelivery.next_attempt_at <= func.statement_timestamp()
    oldest = (
        select(WebhookDelivery.id, WebhookDelivery.endpoint_id, WebhookDelivery.next_attempt_at)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(is_due, WebhookEndpoint.is_enabled, WebhookDelivery.endpoint_id.not_in(busy))
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(LOOK_AHEAD)
        .subquery()
    )
    place = func.row_number().over(partition_by=oldest.c.endpoint_id, order_by=oldest.c.next_attempt_at)
    placed = select(oldest.c.id, oldest.c.next_attempt_at, place.label("place")).subquery()
    in_turn = select(placed.c.id).where(placed.c.place <= MAX_PER_ENDPOINT).order_by(placed.c.next_attempt_at).limit(room)
    chosen = (
        select(WebhookDelivery.id)
        .where(WebhookDelivery.id.in_(in_turn), is_due)  # due still, if another relay took it while we looked
        .with_for_update(skip_locked=True)
        .cte()
    )
    lease = timedelta(seconds=settings.timeout_seconds) + LEASE_MARGIN
    taken = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == chosen.c.id, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .values(next_attempt_at=func.clock_timestamp() + lease)
        .returning(
            WebhookDelivery.id,
            WebhookDelivery.organization_id,
            WebhookDelivery.endpoint_id,
            WebhookDelivery.attempts,
            WebhookEndpoint.url,
            WebhookEndpoint.secret,
            WebhookDelivery.body,
        )
        .execution_options(synchronize_session=False)
    )
    with sessions.begin() as session:
        return [Message(*row[:-1], body=row.body.encode()) for row in session.execute(taken)]


async def _attempt(sessions: orm.sessionmaker[orm.Session], client: Client, settings: WebhookSettings, message: Message) -> None:
    outcome = await _send(client, settings, message)
    about = {"delivery": message.id, "endpoint": message.endpoint_id, "org_id": message.organization_id}
    log.info("webhook_attempted", **about, attempt=message.attempts + 1, status=outcome.status, is_delivered=not outcome.error)
    try:
        await asyncio.to_thread(_settle, sessions, message, outcome)
    except Exception as error:  # one that cannot be settled must not break off the others; its lease sends it again
        log.warning("webhook_unsettled", **about, error=type(error).__name__)


async def _send(client: Client, settings: WebhookSettings, message: Message) -> Outcome:
    try:
        async with asyncio.timeout(settings.timeout_seconds):
            status = await _post(client, settings, message)
    except TimeoutError:
        return Outcome(None, f"no whole answer within {settings.timeout_seconds:g} seconds")
    except Exception as error:
        return Outcome(None, _told(error))
    if 200 <= status < 300:
        return Outcome(status, None)
    if 300 <= status < 400:
        return Outcome(status, f"the receiver answered {status}; redirects are not followed, give the endpoint its final URL")
    return Outcome(status, f"the receiver answered {status}")


async def _post(client: Client, settings: WebhookSettings, message: Message) -> int:
    """The status that the receiver answers. What else it says is read up to a limit and forgotten."""
    url = guard.parse(message.url, settings)
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "content-length": str(len(message.body)),
        "user-agent": USER_AGENT,
        **signing.headers(message.secret, message_id=message.id, unix_seconds=int(time.time()), body=message.body),
    }
    patience = {"timeout": {"connect": CONNECT_SECONDS}}
    async with client.stream(
        "POST", target, headers=list(headers.items()), content=message.body, extensions=patience
    ) as response:
        read_bytes = 0
        async for chunk in response.aiter_stream():
            read_bytes += len(chunk)
            if read_bytes > MAX_ANSWER_BYTES:
                break
        return response.status


def _told(error: Exception) -> str:
    """The error in words of ours: what the receiver sent must not come back to the customer."""
    match error:
        case guard.UrlRefused():
            return str(error)
        case httpcore.ConnectTimeout():
            return "could not connect: the address does not answer"
        case httpcore.ConnectError():  # the system's words, or OpenSSL's
            return f"could not connect: {error}"[:300]
        case httpcore.ProtocolError():
            return "the answer is not HTTP/1.1"
        case httpcore.NetworkError():
            return "the connection broke off"
        case _:
            log.error("webhook_failed_unexpectedly", exc_info=error)
            return "the message could not be sent"


def _settle(sessions: orm.sessionmaker[orm.Session], message: Message, outcome: Outcome) -> None:
    """Write down how the attempt went.

    A relay that was stopped for longer than its lease may come late: its failure counts only if nobody has tried since.
    """
    settled = update(WebhookDelivery).where(WebhookDelivery.id == message.id, WebhookDelivery.delivered_at.is_(None))
    if outcome.error is None:
        settled = settled.values(delivered_at=func.clock_timestamp(), next_attempt_at=None)
    else:
        is_last = message.attempts >= len(RETRY_DELAYS)
        again_at = None if is_last else func.clock_timestamp() + RETRY_DELAYS[message.attempts]
        settled = settled.where(WebhookDelivery.attempts == message.attempts).values(next_attempt_at=again_at)
    with sessions.begin() as session:
        session.execute(
            settled.values(attempts=WebhookDelivery.attempts + 1, last_status=outcome.status, last_error=outcome.error)
        )
