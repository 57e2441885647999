"""Tiers: what GPUs are sold as, in gigabytes, and what a run may count on in each. A tier's queue is `train.<tier>`."""

from collections.abc import Iterable
from typing import get_args

from app.core.catalog import Base, Tier
from app.core.memory import GIB
from app.core.planner import Room
from app.core.settings import GpuSettings

CPU = "cpu"
# ECC in line takes a sixteenth of a GDDR6 card and the driver a little more: NVML says 15,360 MiB of a T4, 23,028 of an A10,
# 46,068 of an L40S. Cards with HBM or without ECC say 99 %.
REPORTED = 0.93
GPUS = tuple(sorted((tier for tier in get_args(Tier) if tier != CPU), key=int))
_LARGEST_FIRST = GPUS[::-1]


def of_card(total_bytes: int, gpu: GpuSettings) -> tuple[str, ...]:
    """The tiers whose promise a card of this size keeps, largest first; none for one that is too small."""
    available = trainer_bytes(total_bytes, gpu)
    return tuple(tier for tier in _LARGEST_FIRST if _promised(tier, gpu) <= available)


def up_to(tier: str) -> tuple[str, ...]:
    """This tier and all smaller ones of GPUs, largest first."""
    return (CPU,) if tier == CPU else _LARGEST_FIRST[_LARGEST_FIRST.index(tier) :]


def trainer_bytes(total_bytes: int, gpu: GpuSettings) -> int:
    """What a trainer may take of a card."""
    return total_bytes - _reserve(total_bytes, gpu) - (engine_bytes(total_bytes, gpu) if gpu.has_engine else 0)


def engine_bytes(total_bytes: int, gpu: GpuSettings) -> int:
    """What an engine may take of a card."""
    return int(total_bytes * gpu.engine_share) if gpu.has_engine else total_bytes - _reserve(total_bytes, gpu)


def shared_bytes(tier: str, gpu: GpuSettings) -> int:
    """What an engine beside a trainer takes of the smallest card that is sold under this name."""
    return int(REPORTED * int(tier) * GIB * gpu.engine_share)


def holding(base: Base, tiers: Iterable[str]) -> list[str]:
    """Those of the tiers that hold the base, smallest first."""
    return sorted((tier for tier in tiers if _size(tier) >= _size(base.tier)), key=_size)


def room(tier: str, gpu: GpuSettings, *, beside_bytes: int = 0) -> Room:
    """What a run let into the tier's queue may count on. `beside_bytes` are for what shares the card with it."""
    if tier == CPU:
        return Room(tier=tier, device="cpu", usable_bytes=None, reserved_bytes=beside_bytes)
    reserved_bytes = _reserve(int(tier) * GIB, gpu) + beside_bytes
    return Room(tier=tier, device="cuda", usable_bytes=_promised(tier, gpu) - beside_bytes, reserved_bytes=reserved_bytes)


def room_of_card(total_bytes: int, gpu: GpuSettings) -> Room:
    """What a trainer has of this very card, which may be more than its tier promises."""
    usable_bytes = trainer_bytes(total_bytes, gpu)
    return Room(tier="card", device="cuda", usable_bytes=usable_bytes, reserved_bytes=total_bytes - usable_bytes)


def _promised(tier: str, gpu: GpuSettings) -> int:
    """Of the smallest card that is sold under this name, less the reserve."""
    return int(REPORTED * int(tier) * GIB) - _reserve(int(tier) * GIB, gpu)


def _reserve(total_bytes: int, gpu: GpuSettings) -> int:
    return max(GIB, total_bytes // 20) if gpu.reserved_bytes is None else gpu.reserved_bytes


def _size(tier: str) -> int:
    return 0 if tier == CPU else int(tier)
