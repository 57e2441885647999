"""What an adapter or checkpoint directory says of itself. Written last: a directory with a manifest is whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

NAME = "manifest.json"


class Damaged(Exception):
    """A directory is not what its manifest says; the message says in what."""


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    sha256: str
    size_bytes: int


class BaseEntry(BaseModel):
    """The base the weights belong to. `digest` covers its 16-bit weights and how they are quantized (see worker.model.base)."""

    model_config = ConfigDict(frozen=True)

    id: str
    revision: str
    digest: str


class TokenVector(BaseModel):
    """A rendered conversation and its token ids: replayed at load, so that training and serving cannot drift apart."""

    model_config = ConfigDict(frozen=True)

    messages: tuple[dict[str, str], ...]
    tokens: tuple[int, ...]


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True)

    format: int = 1
    kind: str
    files: dict[str, FileEntry]
    base: BaseEntry
    dataset_sha256: str
    template_sha256: str
    token_vectors: tuple[TokenVector, ...]
    spec: dict[str, Any]
    code_version: str
    step: int
    metrics: dict[str, float]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests have equal bytes and so equal digests."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """Names the whole directory: the manifest holds the sha256 of every file in it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def entry_of(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)


def read(directory: Path) -> Manifest:
    """The manifest of a directory in which all is as it was written. Raises Damaged."""
    try:
        said = Manifest.model_validate_json((directory / NAME).read_bytes())
    except FileNotFoundError:
        raise Damaged("it has no manifest, so it was never completely written") from None
    except ValidationError as error:
        raise Damaged(f"its manifest cannot be read: {error.errors()[0]['msg']}") from error
    if problems := problems_in(directory, said):
        raise Damaged(problems[0])
    return said


def problems_in(directory: Path, manifest: Manifest) -> list[str]:
    """What in `directory` differs from its manifest; empty when all is as written. An unlisted file is a problem too."""
    present = {path.name for path in directory.iterdir()} - {NAME}
    found = [f"{name} is not in the manifest" for name in sorted(present - manifest.files.keys())]
    for name, entry in manifest.files.items():
        if name not in present:
            found.append(f"{name} is missing")
        elif entry_of(directory / name) != entry:
            found.append(f"{name} differs from its digest")
    return found
