"""torch and bitsandbytes: there, of the right version, and really working."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.doctor.finding import Finding, failed, ok, skipped, warning

INSTALL = "pip install 'tunesmith[worker]'"
CODE = Path(__file__).resolve().parents[2]  # run from there, `-m cli.doctor.probe` is ours whatever the user's folder holds
PROBE_SECONDS = 180.0  # a first import of torch from a slow disk, and a first start of CUDA, take a minute
MAX_NF4_ERROR = 0.15  # of normal weights NF4 in blocks of 64 loses 9 % on average, anything broken far more


@dataclass(frozen=True)
class Report:
    """What the probe said before it ended, and why it ended if not by itself. Empty if torch is not installed."""

    torch: dict[str, Any] | None = None
    bitsandbytes: dict[str, Any] | None = None
    nf4: dict[str, Any] | None = None
    end: str | None = None


def probe() -> Report:
    if not _is_installed("torch"):
        return Report()
    command = [sys.executable, "-m", "cli.doctor.probe"]
    try:
        done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        output = late.stdout if isinstance(late.stdout, str) else (late.stdout or b"").decode()  # bytes also in text mode
        return _report(output, f"no answer within {PROBE_SECONDS:.0f} s")
    return _report(done.stdout, _end(done))


def torch(report: Report) -> Finding:
    if not _is_installed("torch"):
        return skipped("torch", "not installed: no training and no engine here; the API needs none", INSTALL)
    if report.torch is None:
        return failed("torch", f"cannot be imported: {report.end}", f"pip install --force-reinstall {_required('torch')}")
    version, cuda, hip = report.torch["version"], report.torch["cuda"], report.torch["hip"]
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    found = f"{version}, {build} build, {report.torch['threads']} threads"
    required = _required("torch")
    if "==" in required and version.split("+")[0] != required.partition("==")[2]:
        return warning("torch", f"{found}; tested with {required}", f"pip install '{required}'")
    return ok("torch", found)


def bitsandbytes(report: Report) -> Finding:
    if not _is_installed("bitsandbytes"):
        return skipped("bitsandbytes", "not installed: no 4-bit bases here; the API needs none", INSTALL)
    reinstall = f"pip install --force-reinstall '{_required('bitsandbytes')}'"
    if report.torch is None:
        return skipped("bitsandbytes", "not tried, for want of torch", INSTALL)
    if report.bitsandbytes is None:
        return failed("bitsandbytes", f"cannot be imported: {report.end}", reinstall)
    found = f"{report.bitsandbytes['version']}, {report.bitsandbytes['library']} on {report.bitsandbytes['device']}"
    if report.nf4 is None:
        return failed("bitsandbytes", f"{found}: NF4 does not work: {report.end}", f"{reinstall}; then: python -m bitsandbytes")
    found += f", NF4 there and back loses {report.nf4['error']:.1%}"
    if not report.nf4["error"] < MAX_NF4_ERROR:  # so that NaN fails too
        return failed("bitsandbytes", f"{found}; 9 % is right", reinstall)
    return ok("bitsandbytes", found)


def compiler() -> Finding:
    """torch.compile makes the functions between a layer's products with it: C++ for a CPU, Triton's launchers for a GPU."""
    if not _is_installed("torch"):
        return skipped("compiler", "not needed without torch", INSTALL)
    name, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
    found, install = shutil.which(name), "apt install g++ python3-dev, or what your system calls them"
    if found is None:
        return warning("compiler", f"no {name}: training works, several times slower", install)
    if not headers.exists():
        return warning("compiler", f"{found}, but no {headers}: training works, several times slower", install)
    return ok("compiler", found)


def _report(output: str, end: str | None) -> Report:
    said = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    facts_of_torch, facts_of_bitsandbytes, nf4 = (*said, None, None, None)[:3]
    return Report(facts_of_torch, facts_of_bitsandbytes, nf4, end)


def _end(done: subprocess.CompletedProcess[str]) -> str | None:
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _required(package: str) -> str:
    """What our own metadata asks for: `torch==2.13.0`."""
    try:
        asked = importlib.metadata.requires("tunesmith") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return package
    return next((text.partition(";")[0].strip() for text in asked if re.match(rf"{package}\b", text)), package)


def cuda_install() -> str:
    """The registry's own wheels hold CUDA; those without come from an index that somebody named."""
    elsewhere = "unset PIP_INDEX_URL; " if os.environ.get("PIP_INDEX_URL") else ""
    return f"{elsewhere}pip install --force-reinstall {_required('torch')}"
