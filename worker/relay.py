"""The relay: acts on the outbox, delivers webhooks, tells trackers of jobs, rings again what was not heard, reaps.

A plain process, not a Celery task, so that it works with the broker down. Several may run: rows are claimed.
"""

import asyncio
import math
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import httpx
import psycopg
import structlog
from sqlalchemy import delete, func, select, text, update

from app import db, outbox
from app.core import logging
from app.core.engine import AdapterRef
from app.core.settings import Settings
from app.files import derived
from app.files import service as files
from app.inference import engines
from app.jobs import leases
from app.jobs import service as jobs
from app.models import OutboxMessage
from app.outbox import Topic
from app.webhooks import delivery
from worker.celery import make_celery
from worker.services import Services, open_services
from worker.trackers import follow
from worker.trackers.follow import TRACKERS

log = structlog.get_logger()

SWEEP_SECONDS, CLEAN_SECONDS = 5.0, 60.0
SAY_AGAIN_SECONDS = 30.0
BATCH = 100
IN_HAND, AGAIN = timedelta(seconds=60), timedelta(seconds=5)
MAX_PREFETCHES = 20  # nobody waits for one: an adapter is fetched at the latest when it is asked for
REAPER_LOCK, CLEANER_LOCK = 7_301_948, 7_301_949


class Relay:
    """Loops, each woken by a notification from Postgres or by time."""

    def __init__(self, to: Services) -> None:
        self._to = to
        self._celery = make_celery(to.settings)
        self._last_sweep_at, self._reap_after = time.monotonic(), 0.0
        self._said_waiting_at = -math.inf
        self._wakers = {name: asyncio.Event() for name in ("outbox", "webhooks", "sweep", "clean", *TRACKERS)}

    async def run(self) -> None:
        """Until cancelled. A loop that fails says so and goes on: what it works on is in the database."""
        settings = self._to.settings
        async with httpx.AsyncClient(timeout=10) as engine_client, delivery.open_client(settings.webhooks) as webhook_client:

            async def empty_outbox() -> float:
                return await self._empty_outbox(engine_client)

            async def deliver() -> float:
                return await self._deliver(webhook_client)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._repeat("outbox", empty_outbox))
                tasks.create_task(self._repeat("webhooks", deliver))
                tasks.create_task(self._repeat("sweep", self._sweep))
                tasks.create_task(self._repeat("clean", self._clean))
                for type, tracker in TRACKERS.items():
                    for _ in range(tracker.at_once):
                        tasks.create_task(self._repeat(type, partial(self._track, type)))

    async def _repeat(self, name: str, work: Callable[[], Awaitable[float]]) -> None:
        """Do `work`, then wait for a notification, or for as long as it says."""
        waker = self._wakers[name]
        while True:
            waker.clear()
            try:
                wait_seconds = await work()
            except Exception as error:
                if db.is_outage(error):
                    self._say_waiting()
                else:
                    log.warning("relay_loop_failed", loop=name, error=f"{type(error).__name__}: {error}"[:300])
                wait_seconds = SWEEP_SECONDS
            if wait_seconds > 0:
                await woken_or_late(waker, wait_seconds)

    async def _listen(self) -> None:
        """Wake the loops at every commit that left something for them."""
        url = self._to.settings.database.system_url.get_secret_value().replace("postgresql+psycopg", "postgresql", 1)
        while True:
            try:
                opening = psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=5, **db.KEEPALIVES)
                async with await opening as connection:
                    await connection.execute(f"LISTEN {outbox.CHANNEL}")
                    log.info("relay_listening")
                    self._said_waiting_at = -math.inf
                    for waker in self._wakers.values():
                        waker.set()  # for what was committed while nobody listened
                    async for _ in connection.notifies():
                        self._wakers["outbox"].set()
                        self._wakers["webhooks"].set()
            except psycopg.Error:
                self._say_waiting()
                await asyncio.sleep(1)

    def _say_waiting(self) -> None:
        """All loops share one line, and an outage is no news every second."""
        if time.monotonic() - self._said_waiting_at >= SAY_AGAIN_SECONDS:
            log.warning("relay_waits_for_database")
            self._said_waiting_at = time.monotonic()

    async def _empty_outbox(self, client: httpx.AsyncClient) -> float:
        messages = await asyncio.to_thread(self._take)
        rings = {message.payload["queue"] for message in messages if message.topic == Topic.RING}
        failed = await self._ring(rings)
        await asyncio.gather(*(self._act(message, client, failed) for message in messages))
        return 0.0 if len(messages) == BATCH else SWEEP_SECONDS

    def _take(self) -> list[OutboxMessage]:
        """Messages that are due, kept from other relays for a while."""
        with self._to.sessions.begin() as session:
            due = select(OutboxMessage.id).where(OutboxMessage.not_before <= func.clock_timestamp())
            chosen = due.order_by(OutboxMessage.id).limit(BATCH).with_for_update(skip_locked=True).cte()
            taken = (
                update(OutboxMessage)
                .where(OutboxMessage.id == chosen.c.id)
                .values(not_before=func.clock_timestamp() + IN_HAND, attempts=OutboxMessage.attempts + 1)
                .returning(OutboxMessage)
            )
            return list(session.scalars(taken))

    async def _ring(self, queues: set[str]) -> set[str]:
        """Ring each queue once. Returns those that could not be rung."""
        failed = set()
        for queue in queues:
            try:
                await asyncio.to_thread(self._send_ring, queue)
            except Exception as error:  # kombu raises what its transports raise
                log.warning("ring_failed", queue=queue, error=type(error).__name__)
                failed.add(queue)
        return failed

    def _send_ring(self, queue: str) -> None:
        task = "cpu.look" if queue == "cpu" else "train.look"
        self._celery.send_task(task, args=[queue], queue=queue, retry=False, expires=60)

    async def _act(self, message: OutboxMessage, client: httpx.AsyncClient, unheard: set[str]) -> None:
        try:
            match Topic(message.topic):
                case Topic.RING:
                    is_done = message.payload["queue"] not in unheard
                case Topic.PREFETCH:
                    is_done = await self._prefetch(AdapterRef.model_validate(message.payload), client)
                case Topic.PURGE:
                    is_done = await asyncio.to_thread(self._purge, message.payload["prefix"])
        except Exception as error:
            log.warning("outbox_message_failed", topic=message.topic, error=f"{type(error).__name__}: {error}"[:300])
            is_done = message.topic == Topic.PREFETCH and message.attempts >= MAX_PREFETCHES
        await asyncio.to_thread(self._settle, message.id, is_done=is_done)

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

    def _purge(self, prefix: str) -> bool:
        for key in self._to.storage.list_keys(prefix):
            self._to.storage.delete(key)
        return True

    def _settle(self, message_id: str, *, is_done: bool) -> None:
        mine = OutboxMessage.id == message_id
        with self._to.sessions.begin() as session:
            if is_done:
                session.execute(delete(OutboxMessage).where(mine))
            else:
                session.execute(update(OutboxMessage).where(mine).values(not_before=func.clock_timestamp() + AGAIN))

    async def _deliver(self, client: delivery.Client) -> float:
        delivered = await delivery.deliver_due(self._to.sessions, client, self._to.settings.webhooks)
        if delivered:
            return 0.0
        due_in = await asyncio.to_thread(self._next_delivery)
        return SWEEP_SECONDS if due_in is None else min(SWEEP_SECONDS, max(0.05, due_in))

    def _next_delivery(self) -> float | None:
        with self._to.sessions.begin() as session:
            return delivery.next_due_in(session)

    async def _track(self, type: str) -> float:
        return 0.0 if await follow.tell_next(self._to, type) else SWEEP_SECONDS

    def _may_reap(self) -> bool:
        """Not for one whole lease after we could not reach the database: the workers could not either."""
        now, gap = time.monotonic(), SWEEP_SECONDS * 2
        if now - self._last_sweep_at > gap:
            self._reap_after = now + self._to.settings.leases.lease_seconds
        return now >= self._reap_after

    async def _clean(self) -> float:
        await asyncio.to_thread(self._remove_old)
        return CLEAN_SECONDS

    def _remove_old(self) -> None:
        """What no job needs any more, each kind in a transaction of its own."""
        for remove in (files.expire, derived.sweep):
            with self._to.sessions.begin() as session:
                if session.scalar(text("SELECT pg_try_advisory_xact_lock(:id)"), {"id": CLEANER_LOCK}):
                    remove(session)

    async def _sweep(self) -> float:
        """Jobs of silent workers go back to the queue; queues that nobody looked at are rung again."""
        await self._ring(await asyncio.to_thread(self._reap_and_find))
        return SWEEP_SECONDS

    def _reap_and_find(self) -> set[str]:
        with self._to.sessions.begin() as session:
            is_reaper = session.scalar(text("SELECT pg_try_advisory_xact_lock(:id)"), {"id": REAPER_LOCK})
            if self._may_reap() and is_reaper:  # asked once the database has answered: it may have hung until just now
                leases.reap(session, settings=self._to.settings.leases)
        self._last_sweep_at = time.monotonic()
        with self._to.sessions.begin() as session:
            return jobs.due_queues(session)


async def woken_or_late(waker: asyncio.Event, seconds: float) -> None:
    """Not by `asyncio.wait_for`: until Python 3.12 it loses a cancellation that comes with the event, and the relay runs on."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waker.wait()


async def _main(settings: Settings) -> None:
    relay = asyncio.create_task(Relay(open_services(settings)).run())
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, relay.cancel)
    try:
        await relay
    except asyncio.CancelledError:
        log.info("relay_stopped")


def main() -> None:
    settings = Settings()
    logging.configure("relay", format=settings.log_format, level=settings.log_level)
    asyncio.run(_main(settings))


if __name__ == "__main__":
    main()
