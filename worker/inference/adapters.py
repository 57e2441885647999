"""Adapters held by lease: loaded once however many ask, never evicted while someone uses them."""

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from app.core.engine import AdapterRef, TierStats
from app.core.errors import AppError, BadRequest, Unavailable
from app.core.manifest import BaseEntry
from worker.inference.memory import AdapterMemory, Weights

log = structlog.get_logger()

X = TypeVar("X")

REMEMBER_FAILURE_SECONDS = 5.0
SLOT_WAIT_SECONDS = 20.0  # for someone else's answer to end
_NICENESS = 3  # of the threads that load: on few cores the step loop goes first, though a load must not starve


@dataclass(eq=False)
class AdapterLease:
    """`weights` are what the runner applies; they stay loaded until the lease is released."""

    digest: str
    weights: object
    is_released: bool = False


@dataclass(frozen=True)
class Room:
    """What the adapters of one engine may take: of slots, and beside them in memory. Each adapter is counted once."""

    max_slots: int
    slot_bytes: int
    memory_bytes: int


@dataclass(eq=False)
class _Slot:
    name: str
    prepared: Weights  # in this machine's memory: what is kept when the slot is needed for another
    placing: "asyncio.Task[Weights]"
    leases: int = 0
    is_pinned: bool = False


@dataclass
class _Failure:
    error: AppError
    until: float = field(default_factory=lambda: time.monotonic() + REMEMBER_FAILURE_SECONDS)


class AdapterStore:
    """Slots over memory over whatever `load` reads from. A slot is what the runner applies: on a GPU memory of the card, on a CPU
    the very tensors that were in memory.

    The least recently used adapter that nobody leases makes room, and stays in memory. Who finds every slot leased waits in
    order of arrival. Every method belongs to one event loop, so there is no lock; `load` and `place` run in threads of their own,
    off the step loop. `load` checks all that can be checked: what it returns may answer.
    """

    def __init__(
        self,
        load: Callable[[AdapterRef], Weights],
        *,
        base: BaseEntry,
        room: Room,
        place: Callable[[Weights], Weights] | None = None,
    ) -> None:
        self._load, self._place, self._base, self._room = load, place, base, room
        self._slots: OrderedDict[str, _Slot] = OrderedDict()  # by digest, least recently used first
        self._memory = AdapterMemory(room.memory_bytes)
        self._loading: dict[str, asyncio.Task[Weights]] = {}
        self._failures: dict[str, _Failure] = {}
        self._turn, self._is_freed = asyncio.Lock(), asyncio.Event()  # who waits for a slot: one looks, the others queue
        self._hits = self._evictions = self.refusals = 0
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="adapter", initializer=_be_nice)

    @property
    def names(self) -> tuple[str, ...]:
        """Internal names of what is in a slot."""
        return tuple(slot.name for slot in self._slots.values() if slot.placing.done())

    @property
    def leases(self) -> int:
        return sum(slot.leases for slot in self._slots.values())

    def tiers(self) -> dict[str, TierStats]:
        memory = self._memory
        return {
            "slots": TierStats(held=len(self._slots), size_bytes=self._slot_bytes, hits=self._hits, evictions=self._evictions),
            "memory": TierStats(held=len(memory), size_bytes=memory.size_bytes, hits=memory.hits, evictions=memory.evictions),
        }

    async def acquire(self, ref: AdapterRef, *, pin: bool = False) -> AdapterLease:
        """Hold the adapter, loading it if need be.

        Raises what `load` raised, Unavailable without its base or a slot for it, BadRequest when it is larger than all slots.
        """
        self._require_possible(ref)
        slot = self._slots.get(ref.digest)
        self._hits += slot is not None
        slot = slot or await self._seat(ref, await self._prepared(ref))
        slot.leases += 1
        try:
            self._pin(slot, wanted=pin)
            weights = await asyncio.shield(slot.placing)  # a caller that leaves must not stop it for the others
        except BaseException:
            self._give_back(slot)
            raise
        self._slots.move_to_end(ref.digest)
        return AdapterLease(ref.digest, weights)

    async def prefetch(self, ref: AdapterRef) -> None:
        """Have it ready: in a slot if one is free, otherwise in memory. Nobody is put out. Raises as `acquire` does."""
        self._require_possible(ref)
        if ref.digest in self._slots:
            return
        prepared = await self._prepared(ref)
        if ref.digest not in self._slots and self._fits(prepared):
            await asyncio.shield(self._open(ref, prepared).placing)

    def release(self, lease: AdapterLease) -> None:
        if not lease.is_released:
            lease.is_released = True
            self._give_back(self._slots[lease.digest])

    def evict(self, digest: str, *, keep_in_memory: bool = True) -> bool:
        slot = self._slots.get(digest)
        if slot is not None and (slot.leases or not slot.placing.done()):
            return False
        if slot is not None:
            del self._slots[digest]
            self._memory.keep(digest, slot.prepared)
            log.info("adapter_evicted", adapter=slot.name, loaded=len(self._slots))
            self._is_freed.set()
        was_held = slot is not None or self._memory.find(digest) is not None
        if not keep_in_memory:
            self._memory.drop(digest)
        return was_held

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _require_possible(self, ref: AdapterRef) -> None:
        """That it is of this base, and was not refused a moment ago."""
        if ref.base != self._base.id:
            raise Unavailable(f"this engine serves {self._base.id}, not {ref.base}", code="base_not_loaded")
        if ref.base_digest not in (None, self._base.digest):
            message = f"this engine holds {ref.base} in another way than {ref.internal_name} was trained on"
            raise Unavailable(message, code="base_not_loaded")
        failure = self._failures.get(ref.digest)
        if failure and time.monotonic() < failure.until:
            raise failure.error.with_traceback(None)

    async def _prepared(self, ref: AdapterRef) -> Weights:
        """From memory, or by the one load that is under way."""
        if (found := self._memory.find(ref.digest)) is not None:
            return found
        loading = self._loading.get(ref.digest)
        if loading is None:
            loading = self._loading[ref.digest] = asyncio.create_task(self._in_thread(self._load, ref))
            loading.add_done_callback(lambda done: self._settle(ref, done))
        return await asyncio.shield(loading)

    async def _in_thread(self, work: Callable[[X], Weights], of: X) -> Weights:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, of)

    def _settle(self, ref: AdapterRef, done: "asyncio.Task[Weights]") -> None:
        """A load stays in memory though everyone left; a failure is remembered for a moment unless the storage did not answer."""
        del self._loading[ref.digest]
        now = time.monotonic()
        self._failures = {digest: failure for digest, failure in self._failures.items() if now < failure.until}
        error = None if done.cancelled() else done.exception()
        if error is None and not done.cancelled():
            self._memory.keep(ref.digest, done.result())
            return
        log.warning("adapter_not_loaded", adapter=ref.internal_name, reason=str(error))
        if isinstance(error, AppError) and not isinstance(error, Unavailable):
            self._failures[ref.digest] = _Failure(error)
            self.refusals += 1

    async def _seat(self, ref: AdapterRef, prepared: Weights) -> _Slot:
        """A slot for it, waited for if need be, in order of arrival."""
        if prepared.size_bytes > self._room.slot_bytes:
            raise BadRequest(
                f"the adapter {ref.id} is larger than all the room for adapters", param="model", code="adapter_refused"
            )
        try:
            async with asyncio.timeout(SLOT_WAIT_SECONDS), self._turn:
                while ref.digest not in self._slots and not self._make_room(prepared):
                    self._is_freed.clear()
                    await self._is_freed.wait()
        except TimeoutError:
            message = "every adapter this engine can hold is in use; try again shortly"
            raise Unavailable(message, code="adapter_slots_busy") from None
        return self._slots.get(ref.digest) or self._open(ref, prepared)

    def _open(self, ref: AdapterRef, prepared: Weights) -> _Slot:
        slot = self._slots[ref.digest] = _Slot(ref.internal_name, prepared, asyncio.create_task(self._placed(prepared)))
        self._memory.drop(ref.digest)
        slot.placing.add_done_callback(lambda done: self._settle_placing(ref.digest, slot, done))
        return slot

    async def _placed(self, prepared: Weights) -> Weights:
        return await self._in_thread(self._place, prepared) if self._place else prepared

    def _settle_placing(self, digest: str, slot: _Slot, done: "asyncio.Task[Weights]") -> None:
        if (done.cancelled() or done.exception()) and self._slots.get(digest) is slot:
            del self._slots[digest]
            log.warning("adapter_not_placed", adapter=slot.name, reason=None if done.cancelled() else str(done.exception()))
        self._is_freed.set()

    def _make_room(self, wanted: Weights) -> bool:
        """Evict no more than it takes, and nothing at all if that would not do."""
        free = [digest for digest, slot in self._slots.items() if not slot.leases and not slot.is_pinned and slot.placing.done()]
        leaving = list[str]()
        while not self._fits(wanted, without=leaving):
            if len(leaving) == len(free):
                return False
            leaving.append(free[len(leaving)])
        for digest in leaving:
            self.evict(digest)
            self._evictions += 1
        return True

    def _fits(self, wanted: Weights, *, without: Collection[str] = ()) -> bool:
        staying = [slot.prepared.size_bytes for digest, slot in self._slots.items() if digest not in without]
        return len(staying) < self._room.max_slots and sum(staying) + wanted.size_bytes <= self._room.slot_bytes

    @property
    def _slot_bytes(self) -> int:
        return sum(slot.prepared.size_bytes for slot in self._slots.values())

    def _pin(self, slot: _Slot, *, wanted: bool) -> None:
        """One slot is left for everyone else."""
        if not wanted or slot.is_pinned:
            return
        if sum(other.is_pinned for other in self._slots.values()) >= self._room.max_slots - 1:
            raise Unavailable("as many adapters are pinned as this engine may hold for good", code="adapter_pins_busy")
        slot.is_pinned = True

    def _give_back(self, slot: _Slot) -> None:
        slot.leases -= 1
        if not slot.leases:
            self._is_freed.set()


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
