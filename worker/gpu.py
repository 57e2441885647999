"""The one card that this process may use, as NVML tells it: asked before CUDA starts, which then sees that card and no other."""

import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import structlog

from app.core import tiers
from app.core.planner import Room
from app.core.settings import GpuSettings

log = structlog.get_logger()

VISIBLE, ORDER, BY_BUS = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PCI_BUS_ID"


class CardRefused(Exception):
    """This process must not start with the cards it sees; the message is for the operator."""


@dataclass(frozen=True)
class Card:
    """A GPU or a MIG instance of one. `total_bytes` is what NVML reports, a little less than the name promises."""

    name: str
    uuid: str
    total_bytes: int
    driver: str


class Memory(Protocol):
    """What of NVML's answer is read."""

    @property
    def total(self) -> int: ...


class Nvml(Protocol):
    """The part of the module `pynvml` that is used."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Memory: ...
    def nvmlDeviceGetMigMode(self, handle: Any) -> tuple[int, int]: ...


def pin(environment: MutableMapping[str, str]) -> Card | None:
    """Find this process's one card and name it to CUDA by UUID, for us and our children. None without one.

    Raises CardRefused when there is more than one, or when it cannot be told which one is meant.
    """
    nvml = library()
    card = require_one(visible_cards(nvml, environment)) if nvml else None
    if card:
        environment[VISIBLE], environment[ORDER] = card.uuid, BY_BUS
    return card


def require_one(cards: tuple[Card, ...]) -> Card | None:
    """Raises CardRefused when there are more."""
    if len(cards) > 1:
        raise CardRefused(
            f"this worker sees {len(cards)} GPUs; a worker is pinned to one: start one worker per card with {VISIBLE}=<uuid>; "
            f"they are {', '.join(card.uuid for card in cards)}"
        )
    return cards[0] if cards else None


def library() -> Nvml | None:
    """NVML's Python module; None where it is not installed."""
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ImportError:
        log.info("no_gpu", reason="nvidia-ml-py is not installed")
        return None


def visible_cards(nvml: Nvml, environment: Mapping[str, str]) -> tuple[Card, ...]:
    """The cards that CUDA would show, in its order when that is by PCI bus. None without a driver. Raises CardRefused."""
    with _opened(nvml) as is_open:
        if not is_open:
            return ()
        installed = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        named = environment.get(VISIBLE)
        handles = installed if named is None else _named(nvml, installed, named.split(","), environment)
        return tuple(_card(nvml, handle) for handle in handles)


@contextmanager
def _opened(nvml: Nvml) -> Iterator[bool]:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.info("no_gpu", reason=str(error))
        yield False
        return
    try:
        yield True
    finally:
        nvml.nvmlShutdown()


def _named(nvml: Nvml, installed: list[Any], names: list[str], environment: Mapping[str, str]) -> list[Any]:
    """Like CUDA, we stop at the first name that is none: behind it no card is seen."""
    handles = []
    for name in names:
        handle = _find(nvml, installed, name.strip(), environment)
        if handle is None:
            break
        handles.append(handle)
    return handles


def _find(nvml: Nvml, installed: list[Any], name: str, environment: Mapping[str, str]) -> Any | None:
    if name.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            return None
    if name.startswith("GPU-"):  # the start of one is enough, if no other begins so
        found = [handle for handle in installed if nvml.nvmlDeviceGetUUID(handle).startswith(name)]
        return found[0] if len(found) == 1 else None
    if not name.isdecimal() or int(name) >= len(installed):
        return None
    if len(installed) > 1 and environment.get(ORDER, BY_BUS) != BY_BUS:
        raise CardRefused(
            f"{VISIBLE}={name} means one card by {ORDER}={environment[ORDER]} and another one to nvidia-smi; "
            f"name it by its UUID or set {ORDER}={BY_BUS}"
        )
    return installed[int(name)]


def _card(nvml: Nvml, handle: Any) -> Card:
    """Raises CardRefused."""
    uuid = nvml.nvmlDeviceGetUUID(handle)
    if not uuid.startswith("MIG-") and _is_split(nvml, handle):
        raise CardRefused(f"{uuid} is split into MIG instances; name the one to use: {VISIBLE}=MIG-<uuid>")
    try:
        total_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:  # it shares the machine's memory: only TUNESMITH_TRAINING__TIER can say how much is its own
        total_bytes = 0
    return Card(nvml.nvmlDeviceGetName(handle), uuid, total_bytes, nvml.nvmlSystemGetDriverVersion())


def _is_split(nvml: Nvml, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # most cards cannot be
        return False


def room(gpu: GpuSettings) -> Room | None:
    """What a trainer may take of this process's card; None without one. Never run on a GPU: see docs/gpu.md."""
    import torch

    return tiers.room_of_card(torch.cuda.get_device_properties(0).total_memory, gpu) if torch.cuda.is_available() else None


def limit_trainer(gpu: GpuSettings) -> None:
    """On a card, let this process's tensors take no more than the trainer's part. Never run on a GPU: see docs/gpu.md."""
    _limit(lambda total_bytes: tiers.trainer_bytes(total_bytes, gpu))


def limit_engine(gpu: GpuSettings) -> None:
    """On a card, let this process's tensors take no more than the engine's part. Never run on a GPU: see docs/gpu.md."""
    _limit(lambda total_bytes: tiers.engine_bytes(total_bytes, gpu))


def _limit(part_of: Callable[[int], int]) -> None:
    import torch  # whoever only asks for the card does without

    if torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(part_of(total_bytes) / total_bytes)
