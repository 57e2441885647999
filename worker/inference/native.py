"""Our own driver: one base in this process, adapters beside it."""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import structlog
import torch

from app.core import tracing
from app.core.engine import AdapterRef, Chunk, EngineStats, GenerateRequest
from app.core.errors import BadRequest
from app.core.render import Renderer
from app.core.settings import InferenceSettings
from app.core.storage import Storage
from worker.inference import lora, packed, probe, unpacked
from worker.inference.adapters import AdapterLease, AdapterStore, Room
from worker.inference.cache import page_bytes
from worker.inference.disk import AdapterDisk, refused
from worker.inference.driver import Caps, Lease
from worker.inference.engine import Engine
from worker.inference.lora import LoraWeights
from worker.inference.metrics import EngineMetrics
from worker.inference.pages import Pages
from worker.inference.runner import ModelRunner, cache_dtype
from worker.inference.scheduler import Scheduler
from worker.inference.sequence import Sequence as Running
from worker.inference.vocabulary import Vocabulary
from worker.model import adapter as directories
from worker.model.adapter import AdapterRefused
from worker.model.base import LoadedBase

log = structlog.get_logger()

STEP_TOKENS = 512  # how much of prompts one step may read
BUSY_TOKENS = 128  # and how much where somebody decodes: bounds how long a newcomer delays everyone's next token
PAGE_TOKENS = 16


class NativeDriver:
    """See EngineDriver. `close` ends its threads."""

    def __init__(
        self, engine: Engine, store: AdapterStore, renderer: Renderer, caps: Caps, *, disk: AdapterDisk | None = None
    ) -> None:
        self._engine, self._store, self._caps, self._disk = engine, store, caps, disk
        self._several = asyncio.Lock()
        self._vocabulary = Vocabulary(renderer.tokenizer, size=caps.vocabulary, stop_ids=renderer.stop_ids)
        self._vocabulary.prepare()
        engine.start()

    @property
    def caps(self) -> Caps:
        return self._caps

    async def ensure(self, adapter: AdapterRef, *, pin: bool = False) -> AdapterLease:
        return await self._store.acquire(adapter, pin=pin)

    @contextlib.asynccontextmanager
    async def holding(self, request: GenerateRequest) -> AsyncIterator[Sequence[AdapterLease]]:
        if len(request.shares) > self._caps.max_adapters:
            message = f"{len(request.shares)} adapters are mixed, and this engine holds {self._caps.max_adapters} at once"
            raise BadRequest(message, param="adapters")
        with contextlib.ExitStack() as held:
            # who needs several slots takes them alone: two that each have one and wait for the other's would wait for ever
            async with self._several if len(request.shares) > 1 else contextlib.nullcontext():
                leases = list[AdapterLease]()
                for share in request.shares:
                    leases.append(await self._store.acquire(share.adapter))
                    held.callback(self._store.release, leases[-1])
            yield leases

    def release(self, lease: Lease) -> None:
        assert isinstance(lease, AdapterLease)
        self._store.release(lease)

    async def prefetch(self, adapter: AdapterRef) -> None:
        await self._store.prefetch(adapter)

    def evict(self, digest: str, *, keep_in_memory: bool = True) -> bool:
        return self._store.evict(digest, keep_in_memory=keep_in_memory)

    async def stream(self, request: GenerateRequest, leases: Sequence[Lease]) -> AsyncGenerator[Chunk, None]:
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue[Chunk]()

        def emit(chunk: Chunk) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        sequence = Running(
            request,
            vocabulary=self._vocabulary,
            max_tokens=min(request.sampling.max_tokens, self._room_after(request.prompt)),
            emit=emit,
            adapters=_held(request, leases),
            seed=_seed(request, self._caps.base.digest),
        )
        self._engine.submit(sequence)
        first_at: float | None = None
        try:
            while True:
                chunk = await chunks.get()
                if first_at is None and chunk.completion_tokens:
                    first_at = time.perf_counter()
                yield chunk
                if chunk.finish_reason or chunk.error is not None:
                    return
        finally:
            self._engine.cancel(sequence)
            _trace(sequence, first_at)

    def cancel(self, request_id: str) -> None:
        for sequence in self._engine.find(request_id):
            self._engine.cancel(sequence)

    def stats(self) -> EngineStats:
        running, waiting = self._engine.counts()
        base, pages = self._caps.base, self._engine.pages
        return EngineStats(
            base=base.id,
            base_digest=base.digest,
            running=running,
            waiting=waiting,
            adapters=self._store.names,
            pages=pages.count,
            held_pages=pages.held,
            cached_pages=pages.cached,
            tiers=self._store.tiers() | ({"disk": self._disk.stats()} if self._disk else {}),
            fetched_adapters=self._disk.fetches if self._disk else 0,
            refused_adapters=self._store.refusals,
        )

    @property
    def is_draining(self) -> bool:
        return self._engine.is_draining

    async def drain(self) -> None:
        await asyncio.to_thread(self._engine.drain)

    def close(self) -> None:
        self._engine.close()
        self._store.close()

    def _room_after(self, prompt: tuple[int, ...]) -> int:
        """Tokens that may follow it."""
        room = self._caps.context_length - len(prompt)
        if room < 1:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and the model's context {self._caps.context_length}: nothing can follow it",
                param="messages",
                code="context_length_exceeded",
            )
        if not all(0 <= token < self._caps.vocabulary for token in prompt):  # would break the step for all who share it
            raise BadRequest("the prompt holds a token id that the model does not have", param="prompt")
        return room


def _trace(sequence: Running, first_at: float | None) -> None:
    """The parts of an answer that it has come to."""
    began_at, now = sequence.began_at, time.perf_counter()
    tracing.record("queue", sequence.made_at, began_at or now)
    if began_at is not None:
        prompt_tokens = len(sequence.tokens) - sequence.completion_tokens
        tracing.record("prefill", began_at, first_at or now, tokens=prompt_tokens, cached_tokens=sequence.cached_tokens)
    if first_at is not None:
        tracing.record("decode", first_at, now, tokens=sequence.completion_tokens)


def _held(request: GenerateRequest, leases: Sequence[Lease]) -> tuple[tuple[object, float], ...]:
    """The weights that this request asked for, and no others: a mistake here would answer with another model."""
    if [share.adapter.digest for share in request.shares] != [lease.digest for lease in leases]:
        raise ValueError("the leases are not those of the request's adapters")
    held = list[tuple[object, float]]()
    for share, lease in zip(request.shares, leases, strict=True):
        assert isinstance(lease, AdapterLease)
        held.append((lease.weights, share.weight))
    return tuple(held)


def _seed(request: GenerateRequest, base_digest: str) -> bytes:
    """Names what keys and values depend on besides the text, and whose they are: others never find them."""
    shares = [[share.adapter.digest, share.weight] for share in request.shares]
    return hashlib.blake2b(json.dumps([base_digest, shares, request.tenant]).encode(), digest_size=32).digest()


def open_driver(
    base: LoadedBase, storage: Storage, *, cache_dir: Path, settings: InferenceSettings, metrics: EngineMetrics | None = None
) -> NativeDriver:
    """Start serving `base`, which belongs to this driver from now on. Adapters are cached under `cache_dir`."""
    metrics = metrics or EngineMetrics()
    is_unpacked = unpacked.enable(base.model, dtype=base.model.dtype, max_bytes=settings.unpacked_bytes)
    if not is_unpacked:
        packed.enable(base.model, probe=base.renderer.vectors()[-1].tokens)
    pages = Pages(count=_page_count(base, settings), size=PAGE_TOKENS)
    runner = ModelRunner(base.model, page_count=pages.count, page_size=pages.size)
    disk = AdapterDisk(storage, cache_dir / "adapters", max_bytes=settings.adapter_disk_bytes)
    load = metrics.timed(partial(_load, disk=disk, base=base, dtype=runner.lora_dtype, max_rank=settings.max_rank))
    caps = Caps(
        base=base.entry,
        quantization=base.quantization.name,
        context_length=min(base.renderer.context_length, pages.count * pages.size),
        vocabulary=base.model.get_input_embeddings().num_embeddings,
        max_batch=settings.max_batch,
        max_adapters=settings.max_adapters,
        max_rank=settings.max_rank,
    )
    scheduler = Scheduler(
        pages,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        max_waiting_of_tenant=settings.max_waiting_of_tenant,
        step_tokens=STEP_TOKENS,
        busy_tokens=BUSY_TOKENS,
    )
    room = Room(settings.max_adapters, settings.adapter_slot_bytes, settings.adapter_memory_bytes)
    place = None if runner.device.type == "cpu" else partial(LoraWeights.to, device=runner.device)
    store = AdapterStore(load, base=base.entry, room=room, place=place)
    return NativeDriver(Engine(metrics.watching(runner), scheduler), store, base.renderer, caps, disk=disk)


def _page_count(base: LoadedBase, settings: InferenceSettings) -> int:
    """As many as the settings allow, but no more than a full batch of the longest texts needs, and at least one."""
    config, dtype = base.model.config.get_text_config(), cache_dtype(base.model)
    of_a_text = -(-base.renderer.context_length // PAGE_TOKENS)
    affordable = settings.cache_bytes // page_bytes(config, size=PAGE_TOKENS, dtype=dtype)
    return max(1, min(affordable, settings.max_batch * of_a_text))


def _load(ref: AdapterRef, *, disk: AdapterDisk, base: LoadedBase, dtype: torch.dtype, max_rank: int) -> LoraWeights:
    """From storage to what can be applied, checked. Blocks; runs off the step loop."""
    began = time.monotonic()
    directory = disk.open(ref)
    try:
        made = lora.prepare(directories.open(directory, base=base, max_rank=max_rank), dtype=dtype)
        probe.require_sane(made)
    except AdapterRefused as error:
        raise refused(ref, str(error)) from error
    seconds = round(time.monotonic() - began, 3)
    log.info("adapter_loaded", adapter=ref.internal_name, rank=made.rank, size_bytes=made.size_bytes, seconds=seconds)
    return made
