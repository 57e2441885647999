"""A webhook receiver: a real HTTP server on loopback that remembers what came."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[BaseHTTPRequestHandler], None]


def answering(status: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "2")
        handler.end_headers()
        handler.wfile.write(b"ok")

    return answer


@dataclass
class Receiver:
    """`answer` may be changed at any time."""

    port: int = 0
    answer: Answer = field(default_factory=lambda: answering(200))
    received: list[Received] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks"

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """Take the message and say nothing until the sender hangs up."""
        handler.rfile.read(1)

    def take(self, handler: BaseHTTPRequestHandler, lock: threading.Lock) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        with lock:
            self.received.append(Received(handler.path, {name.lower(): value for name, value in handler.headers.items()}, body))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.answer(handler)
        finally:
            with lock:
                self.at_once -= 1


@contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver, lock = Receiver(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_POST(self) -> None:
            receiver.take(self, lock)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # else closing does not wait for them
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass  # the sender may hang up: that is what some tests are about

    server = Server(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
