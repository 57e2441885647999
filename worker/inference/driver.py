"""The one interface of an inference engine: what a base can do, adapters held by lease, answers as a stream."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from app.core.engine import AdapterRef, Chunk, EngineStats, GenerateRequest
from app.core.manifest import BaseEntry
from app.core.spec import QuantizationName


@dataclass(frozen=True)
class Caps:
    """What this engine serves and how much of it at once."""

    base: BaseEntry
    quantization: QuantizationName
    context_length: int
    vocabulary: int
    max_batch: int
    max_adapters: int
    max_rank: int


class Lease(Protocol):
    """An adapter that stays loaded until the lease is released."""

    @property
    def digest(self) -> str: ...


class EngineDriver(Protocol):
    """Called from one event loop. Failures are `AppError`s; those before the first chunk are raised, later ones are a chunk."""

    @property
    def caps(self) -> Caps: ...

    async def ensure(self, adapter: AdapterRef, *, pin: bool = False) -> Lease:
        """Load the adapter if it is not, and hold it. Any number of callers, one load.

        Raises NotFound (`model_not_found`), BadRequest (`adapter_refused`), Unavailable (`base_not_loaded`, no room, no storage).
        """
        ...

    def holding(self, request: GenerateRequest) -> AbstractAsyncContextManager[Sequence[Lease]]:
        """Leases of all the request's adapters, until it is left. Raises what `ensure` raises."""
        ...

    def release(self, lease: Lease) -> None:
        """Give the lease back; twice is the same as once."""
        ...

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Have it ready before someone asks, without putting another one out. Raises as `ensure` does."""
        ...

    def evict(self, digest: str, *, keep_in_memory: bool = True) -> bool:
        """Take an adapter that nobody leases, pinned or not, out of its slot. False if it is not loaded or in use."""
        ...

    def stream(self, request: GenerateRequest, leases: Sequence[Lease]) -> AsyncGenerator[Chunk, None]:
        """The answer; leaving the iterator early frees all it held. `leases` are those of `request.shares`, in their order.

        Raises BadRequest (`context_length_exceeded`) and Unavailable (queue full, draining) before the first chunk.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a running or waiting request; one that is not there is ignored."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def is_draining(self) -> bool: ...

    async def drain(self) -> None:
        """Refuse new requests and those that wait, return when the last running one has ended."""
        ...

    def close(self) -> None: ...
