"""Small processes in place of ours: `python -m tests.embedded.fake_process api HOST PORT`, or `engine`."""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class Readyz(BaseHTTPRequestHandler):
    """No engine yet when first asked."""

    engines = 0

    def do_GET(self) -> None:
        body = json.dumps({"status": "ok", "quantizations": ["nf4"] * Readyz.engines}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        Readyz.engines = 1


if sys.argv[1] == "api":
    HTTPServer((sys.argv[2], int(sys.argv[3])), Readyz).serve_forever()
time.sleep(1000)
