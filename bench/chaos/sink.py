"""A webhook receiver that writes down what came, and now and then refuses or hangs up."""

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook, WebhookVerificationError

from bench.chaos.ledger import Ledger

REFUSED_SHARE = 0.1


class Sink:
    """`secret` is known once the endpoint is made."""

    def __init__(self, ledger: Ledger, *, refused_share: float = REFUSED_SHARE) -> None:
        self._ledger, self._rng, self.refused_share = ledger, random.Random(5), refused_share
        self.secret: str | None = None
        self.port = 0

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        assert self.secret is not None
        try:
            Webhook(self.secret).verify(body, {name.lower(): value for name, value in handler.headers.items()})
            is_genuine = True
        except WebhookVerificationError:
            is_genuine = False
        is_taken = self._rng.random() >= self.refused_share
        digest = hashlib.sha256(body).hexdigest()
        about = {"id": handler.headers["webhook-id"], "sha256": digest, "is_genuine": is_genuine, "is_taken": is_taken}
        self._ledger.note("webhook", **about)
        handler.send_response(200 if is_taken else 503)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@contextmanager
def receiving(sink: Sink, port: int = 0) -> Iterator[Sink]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            sink.take(self)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass  # a relay that is killed hangs up

    server = Server(("127.0.0.1", port), Handler)
    sink.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
