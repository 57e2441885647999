"""Which quantized weights belong to a base: looked up without torch and without loading anything."""

import hashlib
from pathlib import Path

from app.core.catalog import Base
from app.core.spec import QuantizationSpec
from worker.model import card, source

FORMAT = 1  # of what lies under bases/; another number prepares everything anew


def path(base: Base, revision: str, cache_dir: Path, quantization: QuantizationSpec) -> Path:
    """The file that holds the digest of this base's weights in this quantization: the name of their folder beside it."""
    asked = f"{FORMAT} {source.fingerprint(base)} {revision} {quantization.model_dump_json()}"
    return cache_dir / "bases" / f"{base.id}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.digest"


def find(base: Base, cache_dir: Path, quantization: QuantizationSpec = QuantizationSpec()) -> Path | None:
    """The folder of this base's quantized weights, if this machine has prepared them. Raises BaseRefused."""
    directory = card.find(base, cache_dir)
    if directory is None:
        return None
    return weights(path(base, card.revision_of(directory), cache_dir, quantization))


def weights(pointer: Path) -> Path | None:
    """The folder that it names, if both are there: somebody may have made room on the disk."""
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text()
    return folder if folder.exists() else None
