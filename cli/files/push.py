"""Bring a file to the service: whole if it is small, else in parts, of which those that have arrived are not sent again."""

import hashlib
import io
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cli import account
from cli.api import Api, Refused
from cli.failure import Failed
from cli.output import busy, counting

MIB = 1024 * 1024
SENDERS = 4
LOOK_SECONDS = 0.3

Done = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    path: Path
    start: int
    size_bytes: int
    sha256: str = ""


class _Reader(io.RawIOBase):
    """A piece as a file of its own, telling `done` of what is read; read anew, it takes back what it has told."""

    def __init__(self, file: BinaryIO, piece: Piece, done: Done, is_over: threading.Event) -> None:
        self._file, self._piece, self._done, self._is_over = file, piece, done, is_over
        self._at = 0
        self._file.seek(piece.start)

    def read(self, size: int = -1, /) -> bytes:
        if self._is_over.is_set():
            raise Failed("the upload was given up")
        left = self._piece.size_bytes - self._at
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        self._done(len(data))
        return data

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        at = self._piece.size_bytes + offset if whence == io.SEEK_END else offset
        if at < self._at:
            self._done(at - self._at)
        self._at = at
        self._file.seek(self._piece.start + at)
        return at


def pushed(api: Api, path: Path, *, purpose: str, part_bytes: int) -> dict[str, Any]:
    """The file as the API has it, validated or not yet. Raises Failed."""
    try:
        size_bytes = path.stat().st_size
        if not path.is_file() or not size_bytes:
            raise Failed(f"{path} is {'empty' if path.is_file() else 'no file'}; nothing was sent")
        if size_bytes > part_bytes:
            return _in_parts(api, path, size_bytes, purpose, part_bytes)
        return _whole(api, Piece(path, 0, size_bytes), purpose)
    except OSError as error:
        raise Failed(error) from error


def validated(api: Api, file: dict[str, Any]) -> dict[str, Any]:
    """Wait until it is known whether the file is valid."""
    with busy(f"{file['filename']} is being validated"):
        while file["status"] == "uploaded":
            time.sleep(LOOK_SECONDS)
            file = api.get(f"/files/{file['id']}")
    return file


def _whole(api: Api, piece: Piece, purpose: str) -> dict[str, Any]:
    with piece.path.open("rb") as file, counting(f"sending {piece.path.name}", piece.size_bytes) as done:
        reader = _Reader(file, piece, done, threading.Event())
        sent: dict[str, Any] = api.post("/files", data={"purpose": purpose}, files={"file": (piece.path.name, reader)})
    return sent


def _in_parts(api: Api, path: Path, size_bytes: int, purpose: str, part_bytes: int) -> dict[str, Any]:
    note = _note_of(api, path, purpose, part_bytes)
    upload = _begun(api, note) or _begin(api, note, path, size_bytes, purpose)
    if upload["file"] is None:
        with counting(f"sending {path.name}", size_bytes) as done:
            parts = _send(api, upload, _pieces(path, size_bytes, part_bytes), done)
        with busy(f"putting {len(parts)} parts together"):
            upload = api.post(f"/uploads/{upload['id']}/complete", {"part_ids": parts})
    note.unlink(missing_ok=True)
    file: dict[str, Any] = upload["file"]
    return file


def _send(api: Api, upload: dict[str, Any], pieces: Iterator[Piece], done: Done) -> list[str]:
    """The ids of all parts, in the file's order."""
    arrived, is_over = defaultdict[str, list[str]](list), threading.Event()
    for part in upload["parts"]:
        arrived[part["sha256"]].append(part["id"])

    def sent(piece: Piece) -> str:
        with piece.path.open("rb") as file:
            data = {"data": (piece.path.name, _Reader(file, piece, done, is_over))}
            part: dict[str, Any] = api.post(f"/uploads/{upload['id']}/parts", files=data)
        if part["sha256"] != piece.sha256:
            raise Failed(f"{piece.path} was changed while it was sent; push it again")
        return str(part["id"])

    with ThreadPoolExecutor(SENDERS) as senders:
        parts = list[str | Future[str]]()
        try:
            for piece in pieces:
                if known := arrived[piece.sha256]:
                    parts.append(known.pop())
                    done(piece.size_bytes)
                else:
                    parts.append(senders.submit(sent, piece))
            return [part if isinstance(part, str) else part.result() for part in parts]
        finally:
            is_over.set()  # of a failure, or Ctrl-C: what is under way ends now, what waits is not begun
            senders.shutdown(cancel_futures=True)


def _pieces(path: Path, size_bytes: int, part_bytes: int) -> Iterator[Piece]:
    with path.open("rb") as file:
        for start in range(0, size_bytes, part_bytes):
            data = file.read(part_bytes)
            yield Piece(path, start, len(data), hashlib.sha256(data).hexdigest())


def _begin(api: Api, note: Path, path: Path, size_bytes: int, purpose: str) -> dict[str, Any]:
    asked = {"bytes": size_bytes, "filename": path.name, "mime_type": "text/jsonl", "purpose": purpose}
    upload: dict[str, Any] = api.post("/uploads", asked)
    account.write_private(note, json.dumps({"upload": upload["id"]}))
    return upload | {"parts": []}


def _begun(api: Api, note: Path) -> dict[str, Any] | None:
    """The upload that an earlier push of this very file has begun, if it can go on or has become a file."""
    try:
        upload: dict[str, Any] = api.get(f"/uploads/{json.loads(note.read_text())['upload']}")
    except (OSError, ValueError, LookupError):
        return None
    except Refused as refused:
        if refused.status == 404:
            return None
        raise
    return upload if upload["status"] == "pending" or upload["file"] else None


def _note_of(api: Api, path: Path, purpose: str, part_bytes: int) -> Path:
    """Where the id of an upload is kept while it goes on: another file, a changed one or another service has another note."""
    state = path.stat()
    who = (api.account.base_url, api.account.api_key, str(path.resolve()), state.st_size, state.st_mtime_ns, purpose, part_bytes)
    return account.folder("XDG_STATE_HOME", ".local/state") / "uploads" / hashlib.sha256(repr(who).encode()).hexdigest()[:32]
