"""`up` with small processes in place of ours: `python -m tests.embedded.fake_service up DATA_DIR PORT`."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from app.core.settings import Settings
from cli.failure import failed
from worker.embedded import StackError, stack
from worker.embedded.programs import Process


def processes(_: Settings, host: str, port: int) -> tuple[Process, ...]:
    fake = ("-m", "tests.embedded.fake_service")
    return Process("api", (*fake, "api", host, str(port)), ()), Process("engine", (*fake, "engine"), ("ENGINE_TOKEN",))


class Ready(BaseHTTPRequestHandler):
    """Not ready when first asked."""

    engines = 0

    def do_GET(self) -> None:
        body = json.dumps({"status": "ok", "engines": Ready.engines}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        Ready.engines = 1


def main(role: str, *arguments: str) -> int:
    if role == "api":
        HTTPServer((arguments[0], int(arguments[1])), Ready).serve_forever()
    if role == "engine":
        time.sleep(1000)
    try:
        stack.up(Path(arguments[0]), host="127.0.0.1", port=int(arguments[1]), console=sys.stdout, processes=processes)
    except StackError as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
