"""One message to one receiver: guarded, signed, in bounded time. No database."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from ssl import SSLContext, SSLError

import httpcore
import httpx
import structlog

from app.core.settings import WebhookSettings
from app.webhooks import guard, signing

log = structlog.get_logger()

MAX_AT_ONCE = 128
CONNECT_SECONDS = 5.0  # for one address, so that a dead one leaves time for the next
MAX_ANSWER_BYTES = 64 * 1024
USER_AGENT = "Tunesmith-Webhooks/1"

Client = httpcore.AsyncConnectionPool


@dataclass(frozen=True)
class Message:
    """What is sent, and where. Each of the secrets signs it."""

    id: str
    url: str
    secrets: tuple[str, ...]
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """`error` is None when the receiver took the message."""

    status: int | None
    error: str | None
    milliseconds: int


@asynccontextmanager
async def open_client(
    settings: WebhookSettings, *, resolve: guard.Resolve = guard.resolve, ssl_context: SSLContext | None = None
) -> AsyncIterator[Client]:
    """An HTTP client behind the address guard. It follows no redirect, knows no proxy and keeps no connection."""
    # a lookup cannot be broken off: with a name server that is silent it outlasts the attempt that has given it up
    threads = ThreadPoolExecutor(4 * MAX_AT_ONCE, thread_name_prefix="resolve")
    network = guard.GuardedNetwork(settings, resolve, threads, httpcore.AnyIOBackend())
    try:
        async with httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            max_connections=MAX_AT_ONCE,  # httpcore's own limit is 10, and three receivers that hang would be enough
            max_keepalive_connections=0,
            network_backend=network,
        ) as client:
            yield client
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def send(client: Client, settings: WebhookSettings, message: Message) -> Outcome:
    """Try once. Whatever the receiver does is an outcome, in words of ours."""
    started = time.monotonic()
    status, error = await _try(client, settings, message)
    return Outcome(status, error, round((time.monotonic() - started) * 1000))


async def _try(client: Client, settings: WebhookSettings, message: Message) -> tuple[int | None, str | None]:
    status = None
    try:
        async with asyncio.timeout(settings.timeout_seconds), _post(client, settings, message) as response:
            status = response.status
            await _read_some(response)
    except TimeoutError:
        return status, f"no whole answer within {settings.timeout_seconds:g} seconds"
    except Exception as error:
        return status, _told(error, is_answered=status is not None)
    if 200 <= status < 300:
        return status, None
    if 300 <= status < 400:
        return status, f"the receiver answered {status}; redirects are not followed, give the endpoint its final URL"
    return status, f"the receiver answered {status}"


def _post(client: Client, settings: WebhookSettings, message: Message) -> AbstractAsyncContextManager[httpcore.Response]:
    """What the receiver answers, of which the status is there and the rest to be read."""
    url = guard.parse(message.url, settings)
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "content-length": str(len(message.body)),
        "user-agent": USER_AGENT,
        **signing.headers(message.secrets, message_id=message.id, unix_seconds=int(time.time()), body=message.body),
    }
    patience = {"timeout": {"connect": CONNECT_SECONDS}}
    return client.stream("POST", target, headers=list(headers.items()), content=message.body, extensions=patience)


async def _read_some(response: httpcore.Response) -> None:
    """The receiver is heard out up to a limit. What it says is forgotten."""
    read_bytes = 0
    async for chunk in response.aiter_stream():
        read_bytes += len(chunk)
        if read_bytes > MAX_ANSWER_BYTES:
            break


def _told(error: Exception, *, is_answered: bool) -> str:
    """The error in words of ours: what the receiver sent must not come back to the customer."""
    match error:
        case guard.UrlRefused():
            return str(error)
        case httpcore.ConnectTimeout():
            return "could not connect: the address does not answer"
        case httpcore.ConnectError():  # the system's words, or OpenSSL's
            return f"could not connect: {error}"[:300]
        case httpcore.ProtocolError() if "disconnected without" in str(error):
            return "the receiver closed the connection without an answer"
        case httpcore.ProtocolError() if not is_answered:
            return "the answer is not HTTP/1.1"
        case httpcore.ProtocolError() | httpcore.NetworkError() | SSLError():  # of TLS, what comes after its handshake
            return "the connection broke off"
        case _:
            log.error("webhook_failed_unexpectedly", exc_info=error)
            return "the message could not be sent"
