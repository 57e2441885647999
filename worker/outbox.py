"""Acts on what transactions have left to do: rings Celery, tells engines to fetch, deletes objects that no row names any more.

A message is taken for a while, acted on with no transaction open, and then forgotten, or tried again ever more seldom.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from datetime import timedelta

import httpx
import structlog
from celery import Celery
from sqlalchemy import delete, func, select, update

from app import backups, references
from app.core import crash, tracing
from app.core.engine import AdapterRef
from app.inference import engines
from app.models import OutboxMessage
from app.outbox import Topic
from worker.metrics import RelayMetrics
from worker.services import Services

log = structlog.get_logger()

LOOK_SECONDS = 5.0
BATCH = 100
STORAGE_AT_ONCE = 4  # deletions in hand, each in a thread that waits for as long as storage does
IN_HAND, AGAIN, MAX_DOUBLINGS = timedelta(seconds=60), timedelta(seconds=5), 7
MAX_PREFETCHES = 5  # nobody waits for one: an adapter is fetched at the latest when it is asked for


class Outbox:
    """What hangs in storage holds up no ring: its messages are taken apart from the others, and `storage_threads` do them."""

    def __init__(
        self,
        to: Services,
        celery: Celery,
        metrics: RelayMetrics,
        *,
        storage_threads: Executor,
        is_leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._to, self._celery, self._metrics = to, celery, metrics
        self._storage_threads, self._is_leaving = storage_threads, is_leaving

    async def tell(self, client: httpx.AsyncClient) -> float:
        """Ring and prefetch what is due. Returns the seconds until there may be more."""
        messages = await asyncio.to_thread(self._take, Topic.RING, Topic.PREFETCH, most=BATCH)
        rings = [message.payload for message in messages if message.topic == Topic.RING]
        began_at = time.perf_counter()
        unheard = await self.ring({ring["queue"] for ring in rings})
        for ring in rings:
            if trace := ring.get("trace"):
                tracing.record("ring", began_at, time.perf_counter(), parent=trace, queue=ring["queue"])
        await asyncio.gather(*(self._act(message, self._tell(message, client, unheard)) for message in messages))
        return 0.0 if len(messages) == BATCH else LOOK_SECONDS

    async def ring(self, queues: set[str]) -> set[str]:
        """Ring each queue once. Returns those that could not be rung."""
        failed = set()
        for queue in queues:
            try:
                await asyncio.to_thread(self._send_ring, queue)
            except Exception as error:  # kombu raises what its transports raise
                log.warning("ring_failed", queue=queue, error=type(error).__name__)
                failed.add(queue)
            self._metrics.rang(queue, is_heard=queue not in failed)
        if queues:
            crash.point("ring_sent")
        return failed

    async def free_storage(self) -> float:
        """Delete objects that are due to go. Returns the seconds until there may be more."""
        messages = await asyncio.to_thread(self._take, Topic.PURGE, Topic.TIDY, most=STORAGE_AT_ONCE)
        await asyncio.gather(*(self._act(message, self._delete_in_thread(message)) for message in messages))
        return 0.0 if len(messages) == STORAGE_AT_ONCE else LOOK_SECONDS

    def _take(self, *topics: Topic, most: int) -> Sequence[OutboxMessage]:
        """Messages that are due, kept from other relays for a while. Rings go first: somebody waits for what they begin."""
        is_due = (OutboxMessage.topic.in_(topics), OutboxMessage.not_before <= func.clock_timestamp())
        first = select(OutboxMessage.id).where(*is_due).order_by(OutboxMessage.topic != Topic.RING, OutboxMessage.id).limit(most)
        chosen = first.with_for_update(skip_locked=True).cte()
        taking = (
            update(OutboxMessage)
            .where(OutboxMessage.id == chosen.c.id)
            .values(not_before=func.clock_timestamp() + IN_HAND, attempts=OutboxMessage.attempts + 1)
            .returning(OutboxMessage)
        )
        with self._to.sessions.begin() as session:
            if Topic.PURGE in topics and backups.is_under_way(session):
                later = func.clock_timestamp() + IN_HAND
                session.execute(update(OutboxMessage).where(*is_due).values(not_before=later))
                return []
            taken = session.scalars(taking).all()
        if taken:
            crash.point("outbox_taken")
        return taken

    async def _act(self, message: OutboxMessage, work: Awaitable[bool]) -> None:
        try:
            is_done = await work
        except Exception as error:
            log.warning("outbox_message_failed", topic=message.topic, error=f"{type(error).__name__}: {error}"[:300])
            is_done = message.topic == Topic.PREFETCH and message.attempts >= MAX_PREFETCHES
        self._metrics.messages.labels(message.topic, "done" if is_done else "again").inc()
        crash.point("outbox_acted")
        await asyncio.to_thread(self._settle, message, is_done=is_done)

    async def _tell(self, message: OutboxMessage, client: httpx.AsyncClient, unheard: set[str]) -> bool:
        if message.topic == Topic.RING:
            return message.payload["queue"] not in unheard
        return await self._prefetch(AdapterRef.model_validate(message.payload), client)

    def _send_ring(self, queue: str) -> None:
        task = "cpu.look" if queue == "cpu" else "train.look"
        self._celery.send_task(task, args=[queue], queue=queue, retry=False, expires=60)

    async def _prefetch(self, adapter: AdapterRef, client: httpx.AsyncClient) -> bool:
        """Tell the engine that would be asked first. The model works without: it is then fetched when it is first asked for."""
        ranked = await asyncio.to_thread(self._engines_for, adapter)
        token = self._to.settings.engine_token.get_secret_value()
        for url in ranked[:1]:
            response = await client.post(
                f"{url}/prefetch", content=adapter.model_dump_json(), headers={"Authorization": f"Bearer {token}"}
            )
            log.info("adapter_prefetched", adapter=adapter.internal_name, status=response.status_code)
        return True

    def _engines_for(self, adapter: AdapterRef) -> list[str]:
        timeout = self._to.settings.inference.heartbeat_timeout_seconds
        with self._to.sessions.begin() as session:
            live = engines.list_live(session, timeout_seconds=timeout)
            return [engine.url for engine in engines.ranked(engines.answering(live, adapter.base, adapter), [adapter])]

    async def _delete_in_thread(self, message: OutboxMessage) -> bool:
        return await asyncio.get_running_loop().run_in_executor(self._storage_threads, self._delete, message)

    def _delete(self, message: OutboxMessage) -> bool:
        """Whether all is gone: a relay that leaves stops in between."""
        prefix = message.payload["prefix"]
        keys: Iterable[str] = self._to.storage.list_keys(prefix)
        if message.topic == Topic.TIDY:
            keys = self._unknown(keys, prefix)
        for key in keys:
            if self._is_leaving():
                return False
            self._to.storage.delete(key)
            crash.point("purge_half_done")
        return True

    def _unknown(self, keys: Iterable[str], prefix: str) -> Sequence[str]:
        """What a row knows stays; no row that comes later can know of it, since all who might write one are gone."""
        with self._to.sessions.begin() as session:
            unknown = references.unknown(session, list(keys), under=prefix)
        if unknown:
            log.info("orphans_found", prefix=prefix, objects=len(unknown))
        return unknown

    def _settle(self, message: OutboxMessage, *, is_done: bool) -> None:
        mine = OutboxMessage.id == message.id
        pause = AGAIN * (1 << min(message.attempts - 1, MAX_DOUBLINGS))
        with self._to.sessions.begin() as session:
            if is_done:
                session.execute(delete(OutboxMessage).where(mine))
            else:
                session.execute(update(OutboxMessage).where(mine).values(not_before=func.clock_timestamp() + pause))
