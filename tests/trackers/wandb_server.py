"""A server that the real `wandb` library speaks with, as far as a run needs it: GraphQL for the run, and the stream of its files.

Weights & Biases' own server cannot run here. This one keeps lines by their offset and tells a resumed run its last line, as
theirs is known to do from the library's requests.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


@dataclass
class Run:
    """What the server knows of one. `is_complete` once the library has ended it."""

    about: dict[str, Any]
    lines: dict[str, list[str]] = field(default_factory=dict)
    exit_code: int | None = None
    is_complete: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get(HISTORY, ())]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads(self.lines[SUMMARY][-1]))

    @property
    def config(self) -> dict[str, Any]:
        return {name: one["value"] for name, one in json.loads(self.about["config"]).items()}


@dataclass
class WandbServer:
    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def graphql(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "RunResumeStatus":
                run = self.runs.get(asked["name"])
                return {"model": {"id": "1", "name": asked["project"], "entity": _ENTITY, "bucket": run and _resumed(run)}}
            case "UpsertBucket":
                about = {name: value for name, value in asked.items() if value is not None}
                run = self.runs.setdefault(asked["name"], Run({}))
                run.about |= about
                return {"upsertBucket": {"bucket": _bucket(run), "inserted": True}}
            case "CreateRunFiles":
                made = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in asked["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": made}}
            case _:
                return {}

    def stream(self, run: Run, said: dict[str, Any]) -> None:
        for name, chunk in said.get("files", {}).items():
            kept, start = run.lines.setdefault(name, []), chunk["offset"]
            kept[start : start + len(chunk["content"])] = chunk["content"]
        if "exitcode" in said:
            run.exit_code = said["exitcode"]
        run.is_complete = run.is_complete or said.get("complete", False) is True


_ENTITY = {"id": "1", "name": "us"}


def _bucket(run: Run) -> dict[str, Any]:
    project = {"id": "1", "name": run.about.get("project"), "entity": _ENTITY}
    return {
        "id": run.about["name"],
        "name": run.about["name"],
        "displayName": run.about.get("displayName"),
        "project": project,
        "historyLineCount": len(run.history),
    }


def _resumed(run: Run) -> dict[str, Any]:
    return {
        **_bucket(run),
        "summaryMetrics": run.lines.get(SUMMARY, ["{}"])[-1],
        "logLineCount": 0,
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "historyTail": json.dumps(run.lines.get(HISTORY, [])[-1:]),
        "eventsTail": "[]",
        "config": run.about.get("config", "{}"),
        "tags": run.about.get("tags", []),
        "wandbConfig": '{"t": 1}',  # without it the library takes the run for one that never began
    }


@contextmanager
def running() -> Iterator[WandbServer]:
    made = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            made.paths.add(self.path.split("?")[0])
            made.keys.add(self.headers.get("authorization", ""))
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                said = _parsed(body, self.headers.get("content-encoding"))
                answer = {"data": made.graphql(said["operationName"], said["variables"])}
            elif self.path.endswith("/file_stream"):
                run = made.runs[self.path.split("/")[-2]]
                made.stream(run, _parsed(body, self.headers.get("content-encoding")))
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _parsed(body: bytes, encoding: str | None) -> Any:
    return json.loads(gzip.decompress(body) if encoding == "gzip" else body)
