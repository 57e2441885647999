"""`tunesmith webhooks`: what happens, as it is told to a receiver."""

import base64
import hmac
import json
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from cli.failure import Failed, say
from cli.options import AsJson, Stack
from cli.output import clock_time

MOST_BYTES = 8 * 1024 * 1024
TOLERANCE_SECONDS = 300  # as in Standard Webhooks
FORWARD_SECONDS = 14.0  # the service waits 15

app = typer.Typer(no_args_is_help=True, help="Receive webhooks on this machine.")

Forward = Annotated[str | None, Option(metavar="URL", help="Send each on to there, as it came, and answer as it does.")]
Events = Annotated[str | None, Option(metavar="TYPE,…", help="Only these, as fine_tuning.job.succeeded; by default all.")]
Url = Annotated[
    str | None, Option(metavar="URL", help="Where the service reaches this receiver, if not at this machine's own address.")
]
Secret = Annotated[str | None, Option(metavar="whsec_…", help="Of an endpoint that there is: none is made, and none removed.")]
Port = Annotated[int, Option(min=0, max=65535, metavar="N", help="Where to listen; 0 is any that is free.")]
Host = Annotated[str, Option(metavar="ADDRESS", help="The address to listen on.")]


@app.command()
def listen(
    forward: Forward = None,
    events: Events = None,
    url: Url = None,
    secret: Secret = None,
    port: Port = 0,
    host: Host = "127.0.0.1",
    data_dir: Stack = None,
    as_json: AsJson = False,
) -> None:
    """Show the service's webhooks as they come.

    An endpoint is made that points here, each message's signature is verified, and in the end, with Ctrl-C, the endpoint is
    removed. --json writes an event a line.
    """
    receiver = _Receiver(forward, as_json)
    with _serving(host, port, receiver) as at:
        if secret:
            receiver.secret = _usable(secret)
            say(f"listening at http://{host}:{at}; Ctrl-C ends it")
            _wait_for_the_end()
            return
        with _endpoint(data_dir, url or f"http://{host}:{at}", events, is_ours=url is None) as endpoint:
            receiver.secret = endpoint["signing_secret"]
            say(f"{endpoint['id']} tells {endpoint['url']} of what happens; Ctrl-C removes it")
            _wait_for_the_end()


class _Receiver:
    """Verifies, tells, forwards. `secret` is there before anything is sent."""

    def __init__(self, forward: str | None, as_json: bool) -> None:
        self.secret = ""
        self._forward, self._as_json = forward, as_json
        self._telling = threading.Lock()

    def receive(self, headers: Mapping[str, str], body: bytes) -> int:
        """The status to answer with."""
        if not is_signed(self.secret, headers, body):
            say("something came whose signature is not right; it was refused")
            return 401
        status = self._sent_on(headers, body) if self._forward else 204
        event = json.loads(body)
        with self._telling:
            print(json.dumps(event) if self._as_json else self._line(event, status), flush=True)
        return status

    def _line(self, event: dict[str, Any], status: int) -> str:
        told = f"{clock_time(event['created_at'])}  {event['type']}  {event['data'].get('id', '')}"
        return f"{told}  → {status}" if self._forward else told

    def _sent_on(self, headers: Mapping[str, str], body: bytes) -> int:
        import httpx

        kept = {name: value for name, value in headers.items() if name.startswith("webhook-") or name == "content-type"}
        try:
            return httpx.post(str(self._forward), content=body, headers=kept, timeout=FORWARD_SECONDS).status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            say(f"{self._forward} did not take it: {error or type(error).__name__}")
            return 502


def is_signed(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether it was sent by who knows the secret, and lately: Standard Webhooks."""
    from app.webhooks import signing

    sent_at, message_id = headers.get("webhook-timestamp", ""), headers.get("webhook-id", "")
    if not sent_at.isdecimal() or abs(time.time() - int(sent_at)) > TOLERANCE_SECONDS:
        return False
    right = signing.headers([secret], message_id=message_id, unix_seconds=int(sent_at), body=body)["webhook-signature"]
    return any(hmac.compare_digest(right.encode(), given.encode()) for given in headers.get("webhook-signature", "").split())


def _usable(secret: str) -> str:
    """Raises Failed."""
    from app.webhooks.signing import PREFIX

    try:
        is_key = bool(base64.b64decode(secret.removeprefix(PREFIX), validate=True))
    except ValueError:
        is_key = False
    if not is_key or not secret.startswith(PREFIX):
        raise Failed(f"--secret is none: it is {PREFIX} and base64, as the endpoint showed it when it was made")
    return secret


@contextmanager
def _serving(host: str, port: int, receiver: _Receiver) -> Iterator[int]:
    """The port at which it is heard."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("content-length", "")
            is_taken = length.isdecimal() and int(length) <= MOST_BYTES
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.send_response(receiver.receive(headers, self.rfile.read(int(length))) if is_taken else 413)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise Failed(f"{host}:{port}: {error}; choose another port with --port") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _endpoint(data_dir: Path | None, url: str, events: str | None, *, is_ours: bool) -> Iterator[dict[str, Any]]:
    from cli.api import Refused, connect

    asked = {"url": url, "name": f"tunesmith webhooks listen, {platform.node()}"}
    wanted = {"event_types": [event.strip() for event in events.split(",")]} if events else {}
    with connect(data_dir) as api:
        try:
            made: dict[str, Any] = api.post("/webhook_endpoints", asked | wanted)
        except Refused as refused:
            hint = "; --url says where the service reaches this machine" if is_ours else ""
            raise Failed(f"{refused}{hint}") from refused
        try:
            yield made
        finally:
            api.delete(f"/webhook_endpoints/{made['id']}")


def _wait_for_the_end() -> None:
    """Ctrl-C, or being told to end, is how it is meant to end."""
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    is_over.wait()
