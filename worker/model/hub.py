"""A model hub's files: fetched, compared with the digests that the hub tells, and remembered as good.

Only safetensors are ever fetched as weights: a pickle runs whatever its author wrote into it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import structlog
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from app.core.catalog import HubSource
from worker.model.directory import locked
from worker.model.refused import BaseRefused, HubUnavailable

log = structlog.get_logger()

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LISTING_SECONDS = 20.0


def _silent(stage: str) -> None:
    pass


@dataclass(frozen=True)
class _File:
    """What the hub says of one file. `sha256` for those in large storage, `blob_id`, git's own sha1, for the others."""

    name: str
    size_bytes: int
    sha256: str | None
    blob_id: str | None

    def is_at(self, path: Path) -> bool:
        """Whether these are the bytes. Without a digest nothing is: what cannot be checked is not trusted."""
        with path.open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            digest.update(file.read())
            return digest.hexdigest() == self.blob_id


@dataclass(frozen=True)
class _Listing:
    commit: str
    files: tuple[_File, ...]


def snapshot(
    source: HubSource,
    revision: str,
    cache_dir: Path,
    patterns: Sequence[str],
    *,
    progress: type[Any] | None = None,
    say: Callable[[str], None] = _silent,
) -> Path:
    """The folder, named by the commit, with the repository's files of these patterns, each as the hub describes it.

    Asks the network for nothing when `revision` is a commit that lies here already; when the hub does not answer, what lies
    here of a branch is taken. `progress` is a tqdm class. Raises BaseRefused, and HubUnavailable where another try may do.
    """
    repository = _Repository(source, revision, cache_dir / "hub")
    with _refusing(repository), locked(repository.folder.with_name(f"{repository.folder.name}.lock")):
        if _COMMIT.fullmatch(revision) and (folder := repository.find_verified(patterns)):
            return folder
        try:
            with _refusing(repository):
                listing = repository.listing()
        except HubUnavailable as error:
            if folder := repository.find_verified(patterns):
                log.warning("hub_unavailable_cache_used", base=source.id, commit=folder.name, reason=str(error))
                return folder
            raise
        return repository.fetched(listing, patterns, progress, say)


class _Repository:
    """One repository of the hub, and its folder in the cache. `verified.json` there tells which files were found good."""

    def __init__(self, source: HubSource, revision: str, hub_dir: Path) -> None:
        self.id, self.revision, self.hub_dir = source.id, revision, hub_dir
        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self.folder = hub_dir / f"models--{source.id.replace('/', '--')}"
        self._record = self.folder / "verified.json"

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.id}"

    def find_verified(self, patterns: Sequence[str]) -> Path | None:
        """The folder of this revision, if all its files of these patterns lie there and were found good."""
        record = self._read()
        commit = record["commits_by_revision"].get(self.revision, self.revision)
        known = record["files_by_commit"].get(commit)
        folder = self.folder / "snapshots" / commit
        wanted = _matching(known["all"], patterns) if known else []
        is_whole = wanted and set(wanted) <= set(known["verified"]) and all((folder / name).is_file() for name in wanted)
        return folder if is_whole else None

    def listing(self) -> _Listing:
        """The revision's commit and files, as the hub tells them."""
        api = HfApi(endpoint=self.endpoint)
        info = api.model_info(self.id, revision=self.revision, files_metadata=True, timeout=_LISTING_SECONDS)
        files = [_File(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in info.siblings or ()]
        if info.sha is None:
            raise BaseRefused(f"{self.endpoint} does not tell the commit of {self.id} at {self.revision!r}")
        if not any(fnmatch(file.name, "*.safetensors") and "/" not in file.name for file in files):
            found = ", ".join(file.name for file in files if file.name.endswith((".bin", ".pth", ".pt"))) or "no weights"
            raise BaseRefused(
                f"{self.page} has no safetensors at {self.revision!r}, only {found}; pickled weights are never loaded, since "
                "they can run code: name a repository or revision with safetensors in the catalog"
            )
        return _Listing(info.sha, tuple(files))

    def fetched(self, listing: _Listing, patterns: Sequence[str], progress: type[Any] | None, say: Callable[[str], None]) -> Path:
        """The folder, with what was missing fetched and all that is new verified."""
        record = self._read()
        known = record["files_by_commit"].get(listing.commit, {"verified": []})
        folder = self.folder / "snapshots" / listing.commit
        names = _matching([file.name for file in listing.files], patterns)
        good = {name for name in known["verified"] if (folder / name).is_file()}
        new = [file for file in listing.files if file.name in names and file.name not in good]
        if new:
            missing_bytes = sum(file.size_bytes for file in new if not (folder / file.name).is_file())
            self._sweep()
            self._require_room(missing_bytes)
            say(f"fetching {len(new)} files, {_size(missing_bytes)}, from {self.page}")
            options: dict[str, Any] = {"tqdm_class": progress} if progress else {}
            wanted = [file.name for file in new]
            snapshot_download(
                self.id, revision=listing.commit, cache_dir=self.hub_dir, allow_patterns=wanted, endpoint=self.endpoint, **options
            )
            say("verifying")
            self._verify(new, folder)
        record["commits_by_revision"][self.revision] = listing.commit
        everything = [file.name for file in listing.files]
        record["files_by_commit"][listing.commit] = {"all": everything, "verified": sorted(good | {file.name for file in new})}
        self._write(record)
        return folder

    def _sweep(self) -> None:
        """Away with what downloads left that were killed: they have names of their own and are never taken up again."""
        for partial in self.folder.glob("blobs/*.incomplete"):
            partial.unlink()

    def _require_room(self, needed_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.folder).free
        if needed_bytes > free_bytes:
            raise BaseRefused(
                f"{self.id} needs {_size(needed_bytes)} in {self.hub_dir}, where {_size(free_bytes)} are free; make "
                "room, or set TUNESMITH_CACHE_DIR to a larger disk"
            )

    def _verify(self, files: list[_File], folder: Path) -> None:
        """Deletes what is not as the hub describes it, so that the next try fetches it anew."""
        damaged = [file.name for file in files if not file.is_at(folder / file.name)]
        for name in damaged:
            (folder / name).resolve().unlink()  # the blob, which the snapshot links to
            (folder / name).unlink(missing_ok=True)
        if damaged:
            raise BaseRefused(
                f"{', '.join(damaged)} of {self.id} from {self.endpoint} has not the digest that the hub tells: damaged on "
                "the way, or changed; deleted, and the next try fetches it anew"
            )

    def _read(self) -> dict[str, Any]:
        if not self._record.exists():
            return {"commits_by_revision": {}, "files_by_commit": {}}
        record: dict[str, Any] = json.loads(self._record.read_text())
        return record

    def _write(self, record: dict[str, Any]) -> None:
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(record, sort_keys=True))
        partial.rename(self._record)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those in the top folder: what lies deeper is the same model in other formats."""
    return [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)]


@contextmanager
def _refusing(repository: _Repository) -> Iterator[None]:
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, XetDownloadError, OSError) as error:
        raise _refusal(error, repository) from error


def _refusal(error: Exception, at: _Repository) -> BaseRefused:
    """What happened, where, and what to do about it. huggingface_hub hides the first cause behind others."""
    for cause in _causes(error):
        match cause:
            case GatedRepoError():
                return BaseRefused(
                    f"{at.id} is gated: accept its licence at {at.page}, then set HF_TOKEN to a token of the account that did"
                )
            case RevisionNotFoundError():
                return BaseRefused(f"{at.page} has no revision {at.revision!r}; correct the catalog's source.revision")
            case RepositoryNotFoundError():
                return BaseRefused(
                    f"{at.endpoint} has no repository {at.id}, or it is private: correct the catalog's source.id, or set "
                    "HF_TOKEN to a token that may read it"
                )
            case HfHubHTTPError():
                return _status_refusal(cause.response.status_code, at)
            case HFValidationError():
                return BaseRefused(f"{at.id!r} is not a repository's name: {cause}")
            case OfflineModeIsEnabled():
                return HubUnavailable(f"{at.id} is not in the cache and HF_HUB_OFFLINE forbids to fetch it from {at.endpoint}")
            case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
                return BaseRefused(f"HF_ENDPOINT is not a URL: {at.endpoint}")
            case httpx2.TransportError():
                return HubUnavailable(
                    f"{at.endpoint} is unreachable or broke off while {at.id} was fetched ({type(cause).__name__}: {cause}); try "
                    "again, which keeps the files that were complete, or set HF_ENDPOINT to a mirror"
                )
            case OSError(errno=errno.ENOSPC):
                free_bytes = shutil.disk_usage(at.hub_dir).free
                return BaseRefused(
                    f"the disk of {at.hub_dir} filled up while {at.id} was fetched ({_size(free_bytes)} free); make room, "
                    "or set TUNESMITH_CACHE_DIR to a larger disk"
                )
    if isinstance(error, OSError) and error.errno:
        return BaseRefused(f"{at.id} cannot be stored in {at.hub_dir}: {error}")
    return HubUnavailable(f"{at.id} could not be fetched from {at.endpoint}: {error}; try again")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The first cause first."""
    if cause := error.__cause__ or error.__context__:
        yield from _causes(cause)
    yield error


def _status_refusal(status: int, at: _Repository) -> BaseRefused:
    if status in {401, 403}:
        return BaseRefused(f"{at.endpoint} refuses the token for {at.id} ({status}); set HF_TOKEN to one that may read it")
    if status == 429 or status >= 500:
        return HubUnavailable(
            f"{at.endpoint} answers {status} for {at.id} at the moment; try again later, or set HF_ENDPOINT to a mirror"
        )
    return BaseRefused(f"{at.endpoint} answers {status} for {at.id} at {at.revision!r}")
