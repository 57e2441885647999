"""A webhook receiver as a customer would run one."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai.types.webhooks import WebhookEndpointWithSecret


class Receiver:
    """Keeps what is posted to `url`."""

    endpoint: WebhookEndpointWithSecret

    def __enter__(self) -> "Receiver":
        received = self._received = list[tuple[bytes, dict[str, str]]]()
        arrived = self._arrived = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append((body, {name.lower(): value for name, value in self.headers.items()}))
                self.send_response(200)
                self.end_headers()
                arrived.set()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, seconds: float = 30) -> tuple[bytes, dict[str, str]]:
        """The first delivery: its body and its headers."""
        assert self._arrived.wait(seconds), "no webhook came"
        return self._received[0]
