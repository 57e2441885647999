"""`tunesmith models`: which base models there are, and bringing one onto this machine."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.failure import failed
from cli.plan import WAYS
from cli.table import columns

if TYPE_CHECKING:
    from app.core.catalog import Base, Catalog
    from app.core.settings import Settings
    from app.core.spec import QuantizationSpec

NO_WORKER = "base models are a worker's, which is not installed here; pip install 'tunesmith[worker]'"
PULL = """\
Fetch a base model, check it against its hub's digests, quantize it and keep it in TUNESMITH_CACHE_DIR, so that workers
and engines that share the folder load it in seconds. Safe to repeat: what is there already is not fetched again.

A gated model needs HF_TOKEN, of an account that has accepted its licence. HF_ENDPOINT names another hub or a mirror."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("models", help="list the base models, or fetch one ahead of its first use")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the catalog, and what of it is prepared on this machine")
    listing.set_defaults(run=run, action=_list)
    pull = actions.add_parser(
        "pull", help="fetch and quantize a base model", description=PULL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pull.add_argument("name", metavar="NAME", help="a base model's id or alias: see `tunesmith models list`")
    pull.add_argument("--quantization", choices=WAYS, default="nf4", help="how workers and engines shall hold it; by default nf4")
    pull.set_defaults(run=run, action=_pull)


def run(options: argparse.Namespace) -> int:
    if find_spec("worker") is None:
        return failed(NO_WORKER)
    from cli.doctor import configuration

    settings = configuration.read_or_say()
    if settings is None:
        return 1
    known, finding = configuration.read_catalog(settings)
    if not configuration.is_fit(finding) or known is None:
        return 1
    status: int = options.action(options, settings, known)
    return status


def _list(_: argparse.Namespace, settings: "Settings", catalog: "Catalog") -> int:
    rows = [("ID", "TIER", "LICENCE", "SOURCE", "GATED", "PREPARED")]
    for base in catalog.values():
        prepared = "yes" if is_prepared(base, settings.cache_dir) else "no"
        rows.append((base.id, base.tier, base.licence, base.source.kind, "yes" if base.gated else "no", prepared))
    for line in columns(rows):
        print(line)
    return 0


def _pull(options: argparse.Namespace, settings: "Settings", catalog: "Catalog") -> int:
    from app.core import spec
    from app.core.errors import NotFound
    from worker.model import pointer
    from worker.model.refused import BaseRefused

    try:
        base = catalog.resolve(options.name)
        quantization = spec.QUANTIZATIONS[options.quantization]
        if folder := pointer.find(base, settings.cache_dir, quantization):
            print(f"{base.id} is here already: {_described(folder)}")
        else:
            print(f"{base.id} is ready: {_described(_pulled(base, settings.cache_dir, quantization))}")
    except (NotFound, BaseRefused, OSError) as error:
        return failed(error)
    return 0


def is_prepared(base: "Base", cache_dir: Path) -> bool:
    """Whether a worker here would load it without preparing it first. Needs the `worker` package."""
    from worker.model import pointer
    from worker.model.refused import BaseRefused

    try:
        return pointer.find(base, cache_dir) is not None
    except (BaseRefused, OSError):  # a package or a folder that is not on this machine
        return False


def _pulled(base: "Base", cache_dir: Path, quantization: "QuantizationSpec") -> Path:
    from worker.model import source

    bars = list[Any]()

    def close_bars() -> None:
        for bar in bars:
            bar.close()

    def say(stage: str) -> None:
        close_bars()  # else the stage would be written into the bar's line
        print(f"{base.id}: {stage}", flush=True)

    try:
        source.fetch(base, cache_dir, progress=_bar_class(bars), say=say)
    finally:
        close_bars()
    say("quantizing")
    from worker.model import base as bases  # imports torch, for which a download that fails need not wait

    return bases.prepare(base, cache_dir, quantization=quantization)


def _bar_class(shown: list[Any]) -> type[Any]:
    """tqdm with one bar for all files: huggingface_hub opens three that tell the same, and closes none."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

    class Received(tqdm):  # type: ignore[misc]  # the same
        def __init__(self, *args: Any, **options: Any) -> None:
            is_received_bytes = str(options.get("desc")).startswith("Downloading")
            super().__init__(*args, **options | {"disable": not is_received_bytes, "bar_format": None})
            shown.append(self)

    return Received


def _described(folder: Path) -> str:
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder}, {size_bytes} bytes"
