"""`tunesmith models`: which base models there are, and bringing one onto this machine."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer import Argument

from cli.failure import Failed
from cli.options import AsJson, Stack
from cli.output import busy, listed, local_time, show
from cli.plan import Way

if TYPE_CHECKING:
    from app.core.catalog import Base, Catalog
    from app.core.settings import Settings
    from app.core.spec import QuantizationSpec

NO_WORKER = "base models are a worker's, which is not installed here; pip install 'tunesmith[worker]'"

app = typer.Typer(help="Show your models; list and fetch a worker's bases.")

Name = Annotated[str, Argument(metavar="NAME", help="A base model's id or alias: see `tunesmith models list`.")]


@app.callback(invoke_without_command=True)
def models(context: typer.Context, data_dir: Stack = None, as_json: AsJson = False) -> None:
    """Show your models, your aliases and the bases that the service knows."""
    if context.invoked_subcommand is not None:
        return
    from cli.api import connect

    with connect(data_dir) as api:
        found = api.get("/models")["data"]
    rows = [(model["id"], model["base_model"], _whose(model), local_time(model["created"])) for model in found]
    show(found, listed(("ID", "BASE", "WHOSE", "CREATED"), rows), as_json=as_json)


def _whose(model: dict[str, Any]) -> str:
    if model["alias_of"]:
        return f"alias of {model['alias_of']}"
    return "base" if model["owned_by"] == "base" else "yours"


@app.command("list")
def list_bases(as_json: AsJson = False) -> None:
    """List the catalog of bases, and what of it is prepared on this machine."""
    settings, catalog = _required()
    names, rows = ("ID", "TIER", "LICENCE", "SOURCE", "GATED", "PREPARED"), list[tuple[str, ...]]()
    for base in catalog.values():
        prepared = "yes" if is_prepared(base, settings.cache_dir) else "no"
        rows.append((base.id, base.tier, base.licence, base.source.kind, "yes" if base.gated else "no", prepared))
    document = [dict(zip(map(str.lower, names), row, strict=True)) for row in rows]
    show(document, listed(names, rows), as_json=as_json)


@app.command()
def pull(name: Name, quantization: Way = "nf4", as_json: AsJson = False) -> None:
    """Fetch and quantize a base model.

    It is checked against its hub's digests, quantized and kept in TUNESMITH_CACHE_DIR,
    so that workers and engines that share the folder load it in seconds. Safe to
    repeat: what is there already is not fetched again.

    A gated model needs HF_TOKEN, of an account that has accepted its licence.
    HF_ENDPOINT names another hub or a mirror.
    """
    settings, catalog = _required()
    from app.core import spec
    from app.core.errors import NotFound
    from worker.model import pointer
    from worker.model.refused import BaseRefused

    try:
        base, way = catalog.resolve(name), spec.QUANTIZATIONS[quantization]
        found = pointer.find(base, settings.cache_dir, way)
        folder = found or _pulled(base, settings.cache_dir, way, sys.stderr if as_json else sys.stdout)
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    except (NotFound, BaseRefused, OSError) as error:
        raise Failed(error) from error
    told = f"{base.id} is {'here already' if found else 'ready'}: {folder}, {size_bytes} bytes"
    show({"id": base.id, "folder": str(folder), "bytes": size_bytes, "was_here": bool(found)}, told, as_json=as_json)


def _required() -> "tuple[Settings, Catalog]":
    """Raises Failed."""
    if find_spec("worker") is None:
        raise Failed(NO_WORKER)
    from cli.doctor import configuration

    settings = configuration.require()
    return settings, configuration.require_catalog(settings)


def is_prepared(base: "Base", cache_dir: Path) -> bool:
    """Whether a worker here would load it without preparing it first. Needs the `worker` package."""
    from worker.model import pointer
    from worker.model.refused import BaseRefused

    try:
        return pointer.find(base, cache_dir) is not None
    except (BaseRefused, OSError):  # a package or a folder that is not on this machine
        return False


def _pulled(base: "Base", cache_dir: Path, quantization: "QuantizationSpec", console: TextIO) -> Path:
    from worker.model import source

    bars = list[Any]()

    def close_bars() -> None:
        for bar in bars:
            bar.close()

    def say(stage: str) -> None:
        close_bars()  # else the stage would be written into the bar's line
        print(f"{base.id}: {stage}", flush=True, file=console)

    try:
        source.fetch(base, cache_dir, progress=_bar_class(bars), say=say)
    finally:
        close_bars()
    say("quantizing")
    from worker.model import base as bases  # imports torch, for which a download that fails need not wait

    with busy("quantizing"):
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
