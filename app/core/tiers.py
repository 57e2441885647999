"""Tiers: what GPUs are sold as, in gigabytes, and what a run may count on in each. A tier's queue is `train.<tier>`."""

from collections.abc import Iterable
from typing import get_args

from app.core.catalog import Base, Tier
from app.core.memory import GIB
from app.core.settings import GpuSettings

CPU = "cpu"
# ECC in line takes a sixteenth of a GDDR6 card and the driver a little more: NVML says 15,360 MiB of a T4, 23,028 of an A10,
# 46,068 of an L40S. Cards with HBM or without ECC say 99 %.
REPORTED = 0.93
_LARGEST_FIRST: tuple[str, ...] = tuple(sorted((tier for tier in get_args(Tier) if tier != CPU), key=int, reverse=True))


def of_card(total_bytes: int, gpu: GpuSettings) -> tuple[str, ...]:
    """The tiers whose promise a card of this size keeps, largest first; none for one that is too small."""
    room = trainer_bytes(total_bytes, gpu)
    return tuple(tier for tier in _LARGEST_FIRST if _promised(tier, gpu) <= room)


def up_to(tier: str) -> tuple[str, ...]:
    """This tier and all smaller ones of GPUs, largest first."""
    return (CPU,) if tier == CPU else _LARGEST_FIRST[_LARGEST_FIRST.index(tier) :]


def trainer_bytes(total_bytes: int, gpu: GpuSettings) -> int:
    """What a trainer may take of a card."""
    return total_bytes - _reserve(total_bytes, gpu) - (engine_bytes(total_bytes, gpu) if gpu.has_engine else 0)


def engine_bytes(total_bytes: int, gpu: GpuSettings) -> int:
    """What an engine may take of a card."""
    return int(total_bytes * gpu.engine_share) if gpu.has_engine else total_bytes - _reserve(total_bytes, gpu)


def usable_bytes(tier: str, gpu: GpuSettings) -> int | None:
    """The largest predicted peak that is let into the tier's queue; None where memory is not planned."""
    return None if tier == CPU else _promised(tier, gpu)


def holding(base: Base, tiers: Iterable[str]) -> list[str]:
    """Those of the tiers that hold the base, smallest first."""
    return sorted((tier for tier in tiers if _size(tier) >= _size(base.tier)), key=_size)


def smallest_with_room(base: Base, tiers: Iterable[str], gpu: GpuSettings, *, predicted_bytes: int) -> str | None:
    """The smallest of the tiers that holds the base and a run of this peak; None when no tier does."""
    for tier in holding(base, tiers):
        usable = usable_bytes(tier, gpu)
        if usable is None or predicted_bytes <= usable:
            return tier
    return None


def _promised(tier: str, gpu: GpuSettings) -> int:
    """Of the smallest card that is sold under this name, less the reserve."""
    return int(REPORTED * int(tier) * GIB) - _reserve(int(tier) * GIB, gpu)


def _reserve(total_bytes: int, gpu: GpuSettings) -> int:
    return max(GIB, total_bytes // 20) if gpu.reserved_bytes is None else gpu.reserved_bytes


def _size(tier: str) -> int:
    return 0 if tier == CPU else int(tier)
