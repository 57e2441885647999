"""Adapters in memory, held by lease: loaded once however many ask, never evicted while someone uses them."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from app.core.engine import AdapterRef
from app.core.errors import AppError, Unavailable
from app.core.manifest import BaseEntry

log = structlog.get_logger()

REMEMBER_FAILURE_SECONDS = 5.0


@dataclass(eq=False)
class AdapterLease:
    """`weights` are what the runner applies; they stay loaded until the lease is released."""

    digest: str
    weights: object
    is_released: bool = False


@dataclass(eq=False)
class _Slot:
    name: str
    loading: "asyncio.Task[object]"
    leases: int = 0
    is_pinned: bool = False


@dataclass
class _Failure:
    error: AppError
    until: float = field(default_factory=lambda: time.monotonic() + REMEMBER_FAILURE_SECONDS)


class AdapterStore:
    """At most `max_adapters` at a time; the least recently used one that nobody leases makes room.

    Every method belongs to one event loop, so there is no lock; `load` runs in a thread of its own, off the step loop.
    """

    def __init__(self, load: Callable[[AdapterRef], object], *, base: BaseEntry, max_adapters: int) -> None:
        self._load, self._base, self._max_adapters = load, base, max_adapters
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by digest, least recently used first
        self._failures: dict[str, _Failure] = {}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="adapter")

    @property
    def names(self) -> tuple[str, ...]:
        """Internal names of what is loaded."""
        return tuple(slot.name for slot in self._slots.values() if slot.loading.done())

    async def acquire(self, ref: AdapterRef, *, pin: bool = False) -> AdapterLease:
        """Hold the adapter, loading it if need be. Raises what `load` raised, and Unavailable without base or room for it."""
        if ref.base != self._base.id:
            raise Unavailable(f"this engine serves {self._base.id}, not {ref.base}", code="base_not_loaded")
        if ref.base_digest not in (None, self._base.digest):
            message = f"this engine holds {ref.base} in another way than {ref.internal_name} was trained on"
            raise Unavailable(message, code="base_not_loaded")
        self._raise_remembered(ref.digest)
        slot = self._slots.get(ref.digest) or self._open(ref)
        slot.leases += 1
        try:
            weights = await asyncio.shield(slot.loading)  # a caller that leaves must not stop the load for the others
        except BaseException:
            slot.leases -= 1
            raise
        slot.is_pinned |= pin
        self._touch(ref.digest)
        return AdapterLease(ref.digest, weights)

    def release(self, lease: AdapterLease) -> None:
        if not lease.is_released:
            lease.is_released = True
            self._slots[lease.digest].leases -= 1

    def evict(self, digest: str) -> bool:
        slot = self._slots.get(digest)
        if slot is None or slot.leases or not slot.loading.done():
            return False
        del self._slots[digest]
        log.info("adapter_evicted", adapter=slot.name, loaded=len(self._slots))
        return True

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _raise_remembered(self, digest: str) -> None:
        failure = self._failures.get(digest)
        if failure and time.monotonic() < failure.until:
            raise failure.error.with_traceback(None)

    def _open(self, ref: AdapterRef) -> _Slot:
        if len(self._slots) >= self._max_adapters:
            self._make_room()
        loading = asyncio.create_task(self._read(ref))
        slot = self._slots[ref.digest] = _Slot(ref.internal_name, loading)
        loading.add_done_callback(lambda done: self._settle(ref, slot, done))
        return slot

    async def _read(self, ref: AdapterRef) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._load, ref)

    def _settle(self, ref: AdapterRef, slot: _Slot, done: "asyncio.Task[object]") -> None:
        """A failed load leaves its slot, and is remembered for a moment unless it was the storage that did not answer."""
        now = time.monotonic()
        self._failures = {digest: failure for digest, failure in self._failures.items() if now < failure.until}
        error = None if done.cancelled() else done.exception()
        if error or done.cancelled():
            if self._slots.get(ref.digest) is slot:
                del self._slots[ref.digest]
            log.warning("adapter_not_loaded", adapter=ref.internal_name, reason=str(error))
        if isinstance(error, AppError) and not isinstance(error, Unavailable):
            self._failures[ref.digest] = _Failure(error)

    def _make_room(self) -> None:
        for digest, slot in list(self._slots.items()):
            if not slot.is_pinned and self.evict(digest):
                return
        raise Unavailable("every adapter this engine can hold is in use; try again shortly", code="adapter_slots_busy")

    def _touch(self, digest: str) -> None:
        self._slots.move_to_end(digest)
