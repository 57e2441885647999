"""NVIDIA's driver and GPUs, and whether torch can use them."""

import importlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from cli.doctor import training
from cli.doctor.finding import Finding, failed, ok, warning
from cli.doctor.training import Report

GIB = 1024**3
SMI_SECONDS = 20.0  # without its persistence daemon a driver wakes many GPUs for seconds


@dataclass(frozen=True)
class Gpu:
    """`total_bytes` is 0 if it has no memory of its own."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Driver:
    """`cuda` is the newest CUDA that it runs, major and minor."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


class DriverBroken(Exception):
    """There is a driver, and it does not answer."""


def examine(report: Report) -> Finding:
    try:
        driver = read_driver()
    except DriverBroken as error:
        return failed(
            "gpu", f"NVIDIA's driver does not answer: {error}", "nvidia-smi; after an update of the driver: sudo reboot"
        )
    return judge(driver, report, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def judge(driver: Driver | None, report: Report, *, visible: str | None) -> Finding:
    """`visible` is CUDA_VISIBLE_DEVICES. A GPU that cannot be used is a warning if the CPU still can."""
    if driver is None or not driver.gpus:
        return _without_gpu(report)
    found = f"{', '.join(map(_card, driver.gpus))}; driver {driver.version}, CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    if visible is not None:
        found += f"; CUDA_VISIBLE_DEVICES={visible!r}"
    if report.torch is None:
        return warning("gpu", f"{found}; no torch to use it", training.INSTALL)
    if report.torch["is_available"] and report.torch["devices"] > 1:
        message = f"{found}; torch sees {report.torch['devices']}, and a worker takes one"
        return failed("gpu", message, "export CUDA_VISIBLE_DEVICES=<uuid>; nvidia-smi -L lists them")
    if report.torch["is_available"]:
        return ok("gpu", f"{found}; torch sees {report.torch['devices']}")
    if not report.torch["cuda"]:
        return warning("gpu", f"{found}; torch is a build without CUDA: only the CPU tier", training.cuda_install())
    if visible is not None and not visible.strip().strip("-1"):
        return warning("gpu", f"{found}, which hides them all", "unset CUDA_VISIBLE_DEVICES")
    # within a major version of CUDA older drivers run newer builds: NVIDIA's "minor version compatibility"
    if driver.cuda[0] < int(report.torch["cuda"].split(".")[0]):
        remedy = (
            f"update NVIDIA's driver to one for CUDA {report.torch['cuda']}, or install a torch built for CUDA {driver.cuda[0]}"
        )
        return failed("gpu", f"{found}, too old for torch's CUDA {report.torch['cuda']}", remedy)
    remedy = 'python -c "import torch; torch.zeros(1).cuda()" says why; in a container: docker run --gpus all'
    return failed("gpu", f"{found}; torch sees none", remedy)


def _card(gpu: Gpu) -> str:
    if not gpu.total_bytes:
        return f"{gpu.name} (shares the machine's memory)"
    return f"{gpu.name} ({gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free)"


def _without_gpu(report: Report) -> Finding:
    if report.torch is not None and report.torch["is_available"]:
        return ok("gpu", f"torch sees {report.torch['devices']}, and NVIDIA's driver is not to be asked here")
    return ok("gpu", "none found: CPU tier only")


def read_driver() -> Driver | None:
    """From NVML where its Python package is, else from the nvidia-smi command. None if there is no driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return _from_command()
    return _from_nvml(nvml)


def _from_nvml(nvml: Any) -> Driver | None:
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return None
    except nvml.NVMLError as error:
        raise DriverBroken(error) from error
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        version = nvml.nvmlSystemGetDriverVersion()
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(_gpu(nvml, handle) for handle in handles))
    except nvml.NVMLError as error:
        raise DriverBroken(error) from error
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    name = nvml.nvmlDeviceGetName(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return Gpu(name, 0, 0)
    return Gpu(name, int(memory.total), int(memory.free))


def _from_command() -> Driver | None:
    if shutil.which("nvidia-smi") is None:
        return None
    # only the human's table tells of CUDA
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", _nvidia_smi())
    rows = _nvidia_smi("--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits").splitlines()
    cards = [[cell.strip() for cell in row.split(",")] for row in rows if row.strip()]
    if cuda is None or not cards:
        raise DriverBroken("nvidia-smi names no GPU or no CUDA version")
    gpus = tuple(Gpu(name, _mib(total), _mib(free)) for name, _, total, free in cards)
    return Driver(cards[0][1], (int(cuda[1]), int(cuda[2])), gpus)


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DriverBroken(error) from error
    if done.returncode != 0:
        raise DriverBroken((done.stdout + done.stderr).strip())
    return done.stdout


def _mib(text: str) -> int:
    """0 for `[N/A]`."""
    return int(text) * 1024**2 if text.isdigit() else 0
