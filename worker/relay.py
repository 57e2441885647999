"""The relay: acts on the outbox, delivers webhooks, tells trackers of jobs, rings again what was not heard, reaps, cleans up.

A plain process, not a Celery task, so that it works with the broker down. Several may run: rows are claimed.
"""

import asyncio
import math
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx
import structlog
from sqlalchemy import orm, text

from app import db, idempotency, outbox, processes, standing
from app.accounts import users
from app.core import crash, logging, tracing
from app.core.errors import Unavailable
from app.core.settings import Settings
from app.files import derived, uploads
from app.files import service as files
from app.jobs import leases
from app.jobs import service as jobs
from app.webhooks import delivery, delivery_log, rotation, sending
from worker import metrics
from worker.celery import make_celery
from worker.metrics import RelayMetrics, process_id
from worker.outbox import STORAGE_AT_ONCE, Outbox
from worker.services import Services, open_services
from worker.standing import STATEMENT_SECONDS, StandingCollector
from worker.trackers import follow
from worker.trackers.follow import TRACKERS

log = structlog.get_logger()

SWEEP_SECONDS, CLEAN_SECONDS, ABANDONED_SECONDS = 5.0, 60.0, 3600.0
SAY_AGAIN_SECONDS = 30.0
FINISH_SECONDS = 17.0  # for what is in hand when the relay is told to go: longer than a receiver may take, shorter than any grace
ABANDONED = timedelta(days=1)  # nobody sends a single object for so long
AT_COMMIT = ("outbox", "storage", "webhooks")  # loops that a commit may leave something for
REAPER_LOCK, CLEANER_LOCK = 7_301_948, 7_301_949
LOOPS = (*AT_COMMIT, "sweep", "clean", "abandoned", "vitals", *TRACKERS)


class Relay:
    """Loops, each woken by a notification from Postgres or by time."""

    def __init__(self, to: Services) -> None:
        self._to = to
        self._celery = make_celery(to.settings)
        self._last_sweep_at, self._reap_after = time.monotonic(), 0.0
        self._said_waiting_at = -math.inf
        self._wakers = {name: asyncio.Event() for name in LOOPS}
        self.metrics = RelayMetrics(LOOPS)
        self._is_leaving = False
        # of its own: storage that hangs would else hold the threads in which all others ask the database
        self._storage_threads = ThreadPoolExecutor(STORAGE_AT_ONCE, thread_name_prefix="storage")
        self.outbox = Outbox(
            to, self._celery, self.metrics, storage_threads=self._storage_threads, is_leaving=lambda: self._is_leaving
        )

    def leave(self) -> None:
        """Let `run` end as soon as what is in hand is done, and begin nothing more: a message that a receiver is just taking
        would be sent to it again if nobody wrote down that it did."""
        self._is_leaving = True
        for waker in self._wakers.values():
            waker.set()

    async def run(self) -> None:
        """Until `leave`, or cancelled. A loop that fails says so and goes on: what it works on is in the database."""
        settings = self._to.settings
        async with httpx.AsyncClient(timeout=10) as engine_client, sending.open_client(settings.webhooks) as webhook_client:

            async def tell() -> float:
                return await self.outbox.tell(engine_client)

            async def deliver() -> float:
                return await self._deliver(webhook_client)

            loops = [
                self._repeat("outbox", tell),
                self._repeat("storage", self.outbox.free_storage),
                self._repeat("webhooks", deliver),
                self._repeat("sweep", self._sweep),
                self._repeat("clean", self._clean),
                self._repeat("abandoned", self._free_abandoned),
                self._repeat("vitals", self._tell_vitals),
            ]
            for type, tracker in TRACKERS.items():
                loops += [self._repeat(type, partial(self._track, type)) for _ in range(tracker.at_once)]
            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(self._listen())
                await asyncio.gather(*map(tasks.create_task, loops))
                listening.cancel()

    async def _repeat(self, name: str, work: Callable[[], Awaitable[float]]) -> None:
        """Do `work`, then wait for a notification, or for as long as it says."""
        waker = self._wakers[name]
        while not self._is_leaving:
            waker.clear()
            try:
                wait_seconds = await work()
            except Exception as error:
                if db.is_outage(error):
                    self._say_waiting()
                else:
                    log.warning("relay_loop_failed", loop=name, error=f"{type(error).__name__}: {error}"[:300])
                wait_seconds = SWEEP_SECONDS
            else:
                self.metrics.loops.note(name)
            if wait_seconds > 0:
                await woken_or_late(waker, wait_seconds)

    async def _listen(self) -> None:
        """Wake the loops at every commit that left something for them."""
        url = self._to.settings.database.system_url
        async for payload in db.notifications(url, outbox.CHANNEL, on_outage=lambda _: self._say_waiting()):
            if payload is None:
                log.info("relay_listening")
                self._said_waiting_at = -math.inf
            for name in self._wakers if payload is None else AT_COMMIT:
                self._wakers[name].set()

    def _say_waiting(self) -> None:
        """All loops share one line, and an outage is no news every second."""
        if time.monotonic() - self._said_waiting_at >= SAY_AGAIN_SECONDS:
            log.warning("relay_waits_for_database")
            self._said_waiting_at = time.monotonic()

    async def _deliver(self, client: sending.Client) -> float:
        delivered = await delivery.deliver_due(
            self._to.sessions,
            client,
            self._to.settings.webhooks,
            on_attempt=self.metrics.attempted,
            is_leaving=lambda: self._is_leaving,
        )
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
        """What nobody needs any more, until none is left. A kind that cannot be removed keeps no other from it."""
        failure = None
        of_webhooks = (delivery_log.remove_old, delivery_log.remove_deleted, rotation.forget_old)
        for remove in (files.expire, derived.sweep, uploads.sweep, idempotency.expire, users.forget_old, *of_webhooks):
            try:
                while self._remove(remove) and not self._is_leaving:
                    pass
            except Exception as error:
                failure = error
        if failure:
            raise failure

    def _remove(self, remove: Callable[[orm.Session], int]) -> int:
        """A batch, in a transaction of its own. Returns how many have gone: none where another relay is at it."""
        with self._to.sessions.begin() as session:
            is_cleaner = session.scalar(text("SELECT pg_try_advisory_xact_lock(:id)"), {"id": CLEANER_LOCK})
            return remove(session) if is_cleaner else 0

    async def _free_abandoned(self) -> float:
        """What dead processes had begun to send to storage. Some keys may not list it: then it stays, and nothing else does."""
        free = partial(self._to.storage.abort_abandoned, "orgs/", before=datetime.now(UTC) - ABANDONED)
        try:
            freed = await asyncio.get_running_loop().run_in_executor(self._storage_threads, free)
        except Unavailable as error:
            log.warning("abandoned_objects_kept", error=str(error))
        else:
            if freed:
                log.info("abandoned_objects_freed", count=freed)
        return ABANDONED_SECONDS

    async def _tell_vitals(self) -> float:
        """That this relay lives, and since when it reaches the broker, which it may have no reason to ring for hours; and how
        all things stand."""
        await asyncio.to_thread(self._record)
        try:
            await asyncio.to_thread(self._reach_broker)
        except Exception as error:  # kombu raises what its transports raise
            log.warning("broker_unreachable", error=type(error).__name__)
        await asyncio.to_thread(self._keep_standing)
        return processes.BEAT_SECONDS

    def _reach_broker(self) -> None:
        with self._celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=SWEEP_SECONDS)
        self.metrics.broker.note("reached")

    def _record(self) -> None:
        silent_seconds = self.metrics.broker.since("reached")
        with self._to.sessions.begin() as session:
            processes.record(session, process_id(), kind="relay", broker_seconds=silent_seconds)

    def _keep_standing(self) -> None:
        timeout_seconds = self._to.settings.inference.heartbeat_timeout_seconds
        with self._to.sessions.begin() as session:
            standing.keep(session, standing.read(session, engine_timeout_seconds=timeout_seconds))

    async def _sweep(self) -> float:
        """Jobs of silent workers go back to the queue; queues that nobody looked at are rung again."""
        await self.outbox.ring(await asyncio.to_thread(self._reap_and_find))
        return SWEEP_SECONDS

    def _reap_and_find(self) -> set[str]:
        reaped = 0
        with self._to.sessions.begin() as session:
            is_reaper = session.scalar(text("SELECT pg_try_advisory_xact_lock(:id)"), {"id": REAPER_LOCK})
            if self._may_reap() and is_reaper:  # asked once the database has answered: it may have hung until just now
                reaped = leases.reap(session, settings=self._to.settings.leases)
        if reaped:
            self.metrics.reaped.inc(reaped)
            crash.point("jobs_reaped")
        self._last_sweep_at = time.monotonic()
        with self._to.sessions.begin() as session:
            return jobs.due_queues(session)


async def woken_or_late(waker: asyncio.Event, seconds: float) -> None:
    """Not by `asyncio.wait_for`: until Python 3.12 it loses a cancellation that comes with the event, and the relay runs on."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waker.wait()


async def _main(settings: Settings) -> None:
    to = open_services(settings, sits_storage_out=False)  # a thread that does would outlast the grace, and what fails is repeated
    relay = Relay(to)
    timeout_seconds = settings.inference.heartbeat_timeout_seconds
    of_database = db.open_sessions(settings.database.system_url, pool_size=1, statement_seconds=STATEMENT_SECONDS)
    relay.metrics.registry.register(StandingCollector(of_database, engine_timeout_seconds=timeout_seconds))
    metrics.serve(settings.metrics, relay.metrics.registry)
    running = asyncio.create_task(relay.run())
    loop = asyncio.get_running_loop()

    def leave() -> None:
        relay.leave()
        loop.call_later(FINISH_SECONDS, running.cancel)
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, running.cancel)  # a second one does not wait

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, leave)
    with suppress(asyncio.CancelledError):
        await running
    log.info("relay_stopped")


def main() -> None:
    settings = Settings()
    logging.configure("relay", format=settings.log_format, level=settings.log_level)
    tracing.configure("relay", settings.tracing)
    asyncio.run(_main(settings))


if __name__ == "__main__":
    main()
