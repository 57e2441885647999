"""Adapter directories on this machine's disk: fetched from storage, verified file by file, named by digest, immutable."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path

import structlog
from pydantic import ValidationError

from app.core import manifest
from app.core.engine import AdapterRef, TierStats
from app.core.errors import BadRequest, NotFound, Unavailable
from app.core.manifest import Manifest
from app.core.storage import Storage
from worker.model.directory import is_full

log = structlog.get_logger()

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def missing(ref: AdapterRef) -> NotFound:
    return NotFound(f"the adapter {ref.id} is not in storage", param="model", code="model_not_found")


def refused(ref: AdapterRef, reason: str) -> BadRequest:
    """Its bytes are there but must not be served."""
    return BadRequest(f"the adapter {ref.id} cannot be served: {reason}", param="model", code="adapter_refused")


class AdapterDisk:
    """A cache of whole directories: what lies under a digest is exactly what that digest names, or is not there."""

    def __init__(self, storage: Storage, directory: Path, *, max_bytes: int) -> None:
        self._storage, self._root, self._max_bytes = storage, directory, max_bytes
        self._evicting = threading.Lock()
        self.hits = self.fetches = self.evictions = 0
        self._held, self._size_bytes = 0, 0  # when it was last tidied
        self._root.mkdir(parents=True, exist_ok=True)

    def open(self, ref: AdapterRef) -> Path:
        """The adapter's verified directory. Raises NotFound, BadRequest (`adapter_refused`), Unavailable. Blocks."""
        if not _DIGEST.fullmatch(ref.digest):
            raise missing(ref)
        directory = self._root / ref.digest
        if directory.exists() and not _is_whole(directory, ref.digest):
            log.warning("adapter_damaged_on_disk", adapter=ref.internal_name)
            shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            self.hits += 1
        else:
            self._fetch(ref, directory)
            self.fetches += 1
        os.utime(directory)
        with contextlib.suppress(FileNotFoundError):  # another engine on this disk may be evicting too
            self._evict(keep=directory)
        return directory

    def stats(self) -> TierStats:
        return TierStats(held=self._held, size_bytes=self._size_bytes, hits=self.hits, evictions=self.evictions)

    def _fetch(self, ref: AdapterRef, directory: Path) -> None:
        """Download beside the place and rename: a reader sees all of it or nothing."""
        wanted = self._manifest(ref)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._root))
        try:
            for name, entry in wanted.files.items():
                self._fetch_file(ref, name, entry, partial)
            (partial / manifest.NAME).write_bytes(wanted.to_bytes())
            partial.rename(directory)
        except OSError as error:
            if directory.exists():  # another engine on this disk was faster
                return
            if is_full(error):  # another engine may have room
                log.error("adapter_disk_full", adapter=ref.internal_name)
                message = "the engine's disk is full, so the model cannot be loaded; tell the operator, and try again later"
                raise Unavailable(message, code="insufficient_storage") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _fetch_file(self, ref: AdapterRef, name: str, entry: manifest.FileEntry, into: Path) -> None:
        try:
            stored = self._storage.get_file(f"{ref.prefix.rstrip('/')}/{name}", into / name)
        except NotFound:
            raise refused(ref, f"{name} is missing") from None
        if (stored.sha256, stored.size_bytes) != (entry.sha256, entry.size_bytes):
            raise refused(ref, f"{name} differs from its digest")

    def _manifest(self, ref: AdapterRef) -> Manifest:
        try:
            body = self._storage.get(f"{ref.prefix.rstrip('/')}/{manifest.NAME}")
        except NotFound:
            raise missing(ref) from None
        if hashlib.sha256(body).hexdigest() != ref.digest:
            raise refused(ref, f"{manifest.NAME} differs from its digest")
        try:
            found = Manifest.model_validate_json(body)
        except ValidationError:
            raise refused(ref, f"{manifest.NAME} cannot be read") from None
        if found.to_bytes() != body:
            raise refused(ref, f"{manifest.NAME} is not in canonical form")
        if not all(_FILE_NAME.fullmatch(name) for name in found.files):
            raise refused(ref, "a file name is not plain")
        if found.size_bytes > self._max_bytes:
            raise refused(ref, "it is larger than the engine's disk")
        return found

    def _evict(self, *, keep: Path) -> None:
        """Remove the least recently opened directories until the rest fits. Loaded adapters do not need theirs."""
        with self._evicting:
            held = sorted((path for path in self._root.iterdir() if _DIGEST.fullmatch(path.name)), key=_opened_at, reverse=True)
            used = kept = 0
            for directory in sorted(held, key=lambda path: path != keep):
                size_bytes = sum(file.stat().st_size for file in directory.iterdir())
                if used + size_bytes > self._max_bytes and directory != keep:
                    shutil.rmtree(directory, ignore_errors=True)
                    self.evictions += 1
                else:
                    used, kept = used + size_bytes, kept + 1
            self._held, self._size_bytes = kept, used


def _opened_at(directory: Path) -> float:
    return directory.stat().st_mtime


def _is_whole(directory: Path, digest: str) -> bool:
    try:
        body = (directory / manifest.NAME).read_bytes()
        return hashlib.sha256(body).hexdigest() == digest and not manifest.problems_in(
            directory, Manifest.model_validate_json(body)
        )
    except (OSError, ValidationError):
        return False
