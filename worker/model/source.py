"""Where a base's 16-bit weights and its tokenizer come from. Only here is one kind of source told from another."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from app.core import render
from app.core.catalog import Base, HubSource, PathSource, RandomSource, WheelSource
from worker.model import bytewise, hub
from worker.model.refused import BaseRefused, HubUnavailable

__all__ = ["BaseRefused", "HubUnavailable", "Vocabulary", "Weights", "fetch", "fingerprint", "vocabulary", "weights"]

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.jinja", "config.json", "generation_config.json")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """What of a base concerns text. `template` is the stock one, `variables` what it refers to: bos_token and the like."""

    tokenizer: Tokenizer
    template: str
    variables: Mapping[str, str]
    stop_ids: tuple[int, ...]
    revision: str


@dataclass(frozen=True)
class Weights:
    """A folder with config.json and 16-bit safetensors. `sha256` is the same wherever and from whatever copy it was made."""

    folder: Path
    sha256: str


def fingerprint(base: Base) -> str:
    """Changes when the source would give something else; costs no reading. A hub's branch counts as it was first seen."""
    said = [base.source.model_dump_json(), base.family, str(base.context_length)]
    for path in _local_files(base):
        facts = path.stat()
        said.append(f"{path.name} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def fetch(base: Base, cache_dir: Path, *, progress: type[Any], say: Callable[[str], None]) -> None:
    """Bring onto this machine what is not yet here: afterwards neither the vocabulary nor the weights download anything.

    `progress` is a tqdm class, `say` hears each stage. Raises BaseRefused.
    """
    if isinstance(base.source, HubSource):
        patterns = _TOKENIZER_FILES + _WEIGHT_FILES
        hub.snapshot(base.source, base.source.revision, cache_dir, patterns, progress=progress, say=say)


def vocabulary(base: Base, cache_dir: Path) -> Vocabulary:
    """The tokenizer with its template, without touching the weights where the source allows it."""
    match base.source:
        case RandomSource():
            return _random_vocabulary(base)
        case WheelSource(file=file):
            return _vocabulary(_package_folder(base.source), base.source.revision, gguf_file=file)
        case PathSource(path=path):
            return _vocabulary(path, base.source.revision)
        case HubSource(revision=revision):
            folder = hub.snapshot(base.source, revision, cache_dir, _TOKENIZER_FILES)
            return _vocabulary(folder, revision=folder.name)  # a snapshot's folder is named by its commit


@contextmanager
def weights(base: Base, revision: str, cache_dir: Path) -> Iterator[Weights]:
    """The weights as they were published, at the revision the vocabulary came from."""
    match base.source:
        case RandomSource(seed=seed):
            from worker.model import tiny

            with TemporaryDirectory() as temporary:
                yield Weights(Path(temporary), tiny.write(base, seed, Path(temporary)))
        case WheelSource(file=file):
            package = _package_folder(base.source)
            with TemporaryDirectory() as temporary:
                _convert_gguf(package, file, Path(temporary))
                yield Weights(Path(temporary), _sha256_of([package / file]))
        case PathSource(path=path):
            yield Weights(path, _sha256_of(sorted(path.glob("*.safetensors"))))
        case HubSource():
            folder = hub.snapshot(base.source, revision, cache_dir, _WEIGHT_FILES)
            yield Weights(folder, _sha256_of(sorted(folder.glob("*.safetensors"))))


def _local_files(base: Base) -> list[Path]:
    match base.source:
        case WheelSource(file=file):
            return [_package_folder(base.source) / file]
        case PathSource(path=path):
            return sorted(path.iterdir())
    return []


def _package_folder(source: WheelSource) -> Path:
    """Where the package lies, found without importing it: it may want libraries that nobody here needs."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or spec.origin is None:
        raise BaseRefused(f"the package {source.package} is not installed; it carries {source.file}")
    return Path(spec.origin).parent


def _vocabulary(folder: Path, revision: str, **options: Any) -> Vocabulary:
    from transformers import AutoTokenizer  # imports torch, which whoever finds the card written does without

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    if not isinstance(loaded.chat_template, str):
        raise BaseRefused(f"the tokenizer in {folder} has no chat template")
    variables = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    stops = {loaded.eos_token_id} if loaded.eos_token_id is not None else set()
    for name in ("config.json", "generation_config.json"):
        stops |= _end_ids(folder / name)
    return Vocabulary(loaded.backend_tokenizer, loaded.chat_template, variables, tuple(sorted(stops)), revision)


def _end_ids(path: Path) -> set[int]:
    found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    ids = found if isinstance(found, list) else [found]
    return {token for token in ids if token is not None}


def _random_vocabulary(base: Base) -> Vocabulary:
    marked = render.marked_tools_template(base.family) or render.marked_template(base.family)
    unmarked = re.sub(r"\{%-? (end)?generation %\}", "", marked)
    return Vocabulary(bytewise.tokenizer(base.architecture.vocab), unmarked, {}, bytewise.STOP_IDS, base.source.revision)


def _convert_gguf(package: Path, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    model.save_pretrained(folder)


def _sha256_of(paths: list[Path]) -> str:
    """Of files, by their bytes and order: names and folders differ from copy to copy."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
