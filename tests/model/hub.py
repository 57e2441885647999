"""A model hub on this machine: as much of the wire as huggingface_hub speaks to fetch a snapshot, and its ways to fail."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"
_LARGE = ".safetensors"  # what lies in large storage, named by sha256; everything else is a git blob


@dataclass
class Repository:
    """Files at one commit, on the branch main."""

    files: dict[str, bytes]
    is_gated: bool = False
    corrupted: set[str] = field(default_factory=set)  # served with a byte changed
    breaks: dict[str, int] = field(default_factory=dict)  # how often a transfer of the file still breaks off midway

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(_git_blob_id(body).encode() for body in self.files.values())).hexdigest()


@dataclass
class Hub:
    """What it holds, and every request so far as `METHOD path`."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    is_down: bool = False  # answers 503 to everything

    @property
    def transfers(self) -> list[str]:
        return [request.rsplit("/", 1)[1] for request in self.requests if request.startswith("GET") and "/resolve/" in request]


@contextmanager
def running() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Refused(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        try:
            self._route(path)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._answer(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _route(self, path: str) -> None:
        if self.server.hub.is_down:
            raise _Refused(503, None, "Service Unavailable")
        if self.headers.get("Authorization") not in {None, f"Bearer {TOKEN}"}:
            raise _Refused(401, None, "Invalid credentials in Authorization header")
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        if len(parts) < 4:
            raise _Refused(404, None, "Not Found")
        owner, name, kind, revision, *rest = parts
        repository = self._repository(f"{owner}/{name}", revision)
        match kind:
            case "revision" if is_api:
                siblings = [_sibling(name, body) for name, body in repository.files.items()]
                self._json({"id": f"{owner}/{name}", "sha": repository.commit, "siblings": siblings})
            case "tree" if is_api:
                self._json([_tree_entry(name, body) for name, body in repository.files.items()])
            case "resolve":
                self._file(repository, "/".join(rest))

    def _repository(self, repository_id: str, revision: str) -> Repository:
        repository = self.server.hub.repositories.get(repository_id)
        if repository is None:  # without a token the real hub answers 401, so as not to tell what is private
            raise _Refused(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
        if revision not in {"main", repository.commit}:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository

    def _file(self, repository: Repository, name: str) -> None:
        if repository.is_gated and self.headers.get("Authorization") is None:
            raise _Refused(401, "GatedRepo", "Access to model is restricted. You must have access to it and be authenticated")
        if name not in repository.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        body = repository.files[name]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{_git_blob_id(body)}"', "Accept-Ranges": "bytes"}
        if name.endswith(_LARGE):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
        if name in repository.corrupted:
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, start = 200, 0
        if ranged := self.headers.get("Range"):
            status, start = 206, int(ranged.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        does_break = self.command == "GET" and repository.breaks.get(name, 0) > 0
        if does_break:
            repository.breaks[name] -= 1
        self._answer(status, body[start:], headers, sent=(len(body) - start) // 2 if does_break else None)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, sent: int | None = None) -> None:
        """With `sent`, only so many bytes of the body, after which the connection closes."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])


def _git_blob_id(body: bytes) -> str:
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


def _sibling(name: str, body: bytes) -> dict[str, object]:
    told: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": _git_blob_id(body)}
    if name.endswith(_LARGE):
        told["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return told


def _tree_entry(name: str, body: bytes) -> dict[str, object]:
    told: dict[str, object] = {"type": "file", "path": name, "size": len(body), "oid": _git_blob_id(body)}
    if name.endswith(_LARGE):
        told["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return told
