"""A job's events as they are committed, for as many clients as there are: one connection of the process listens for all of them.

Postgres tells of every new event by the id of its job (a trigger, migration 0008e). What is new is then read once, however many
follow the job, and by its sequence number: a notification that was lost or came twice makes no gap and no double.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import structlog
from pydantic import SecretStr
from sqlalchemy import orm, select
from starlette.concurrency import run_in_threadpool

from app import db
from app.accounts.caller import Caller
from app.jobs.life import TERMINAL
from app.jobs.schemas import EventOut
from app.models import Job, JobEvent

log = structlog.get_logger()

CHANNEL = "tunesmith_events"
KEEP_ALIVE_SECONDS = 15.0  # proxies cut a silent connection after half a minute or more
AGAIN_SECONDS = 1.0
AT_ONCE = 200
REMEMBERED = 1000
KEEP_ALIVE, DONE = b": still here\n\n", b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Told:
    """One event, as it goes to everybody who follows."""

    sequence: int
    message: bytes

    @classmethod
    def of(cls, event: JobEvent) -> "Told":
        return cls(event.sequence, f"id: {event.id}\ndata: {EventOut.of(event).model_dump_json()}\n\n".encode())


class _Tail:
    """The events of one job since somebody follows it, one after another.

    `head` is the last that is known here; at first the last that there was, and None before anything was read.
    """

    def __init__(self) -> None:
        self.followers = 0
        self.is_stale = True
        self.is_over = False
        self.read_at = -math.inf
        self.head: int | None = None
        self.reading = asyncio.Lock()
        self._events: list[Told] = []
        self._changed = asyncio.Event()

    def wake(self) -> None:
        self.is_stale = True
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self, seconds: float) -> bool:
        """Whether anything was said to have changed within this time. Ask `is_stale` first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._changed.wait()
        return False

    def since(self, sequence: int) -> list[Told] | None:
        """What is remembered behind `sequence`; None if what follows it is not."""
        if self.head is None or sequence < self.head - len(self._events):
            return None
        first = max(0, len(self._events) - (self.head - sequence))  # there is no gap between them
        return self._events[first : first + AT_ONCE]

    def add(self, new: list[Told], *, after: int, is_over: bool) -> None:
        self._events = [*self._events, *new][-REMEMBERED:]
        self.head = after + len(new)
        self.is_over, self.read_at = is_over, time.monotonic()

    def doubt(self) -> None:
        """Nothing was heard for long, and a connection that listens may be dead: whoever is next looks once for all."""
        self.is_stale |= time.monotonic() - self.read_at >= KEEP_ALIVE_SECONDS


class Feed:
    """Of one process. `run` listens; `follow` is one client's."""

    def __init__(self, sessions: orm.sessionmaker[orm.Session], url: SecretStr) -> None:
        self._sessions, self._url = sessions, url
        self._tails = dict[str, _Tail]()
        self._is_closing, self._has_said_waiting = False, False

    async def run(self) -> None:
        """Until cancelled. An outage of the database makes clients wait, and loses nothing."""
        async for job_id in db.notifications(self._url, CHANNEL, on_outage=self._say_waiting):
            if job_id is None:
                self._has_said_waiting = False
                self._wake_all()
            elif tail := self._tails.get(job_id):
                tail.wake()

    def close(self) -> None:
        """Let every client go, who comes back elsewhere with the id of the last event: streams would hold this process up."""
        self._is_closing = True
        self._wake_all()

    async def follow(self, caller: Caller, job_id: str, *, after: int) -> AsyncIterator[bytes]:
        """Server-sent events behind the sequence `after`, the last of them `[DONE]` once the job is over."""
        tail = self._tails.setdefault(job_id, _Tail())
        tail.followers += 1
        try:
            while not self._is_closing:
                told = await self._next(tail, caller, job_id, after)
                if told is None:
                    yield KEEP_ALIVE
                    await asyncio.sleep(AGAIN_SECONDS)
                elif told:
                    yield b"".join(one.message for one in told)
                    after = told[-1].sequence
                elif tail.is_over and not tail.is_stale:
                    yield DONE
                    return
                elif not tail.is_stale and not await tail.change(KEEP_ALIVE_SECONDS):
                    yield KEEP_ALIVE
                    tail.doubt()
        finally:
            tail.followers -= 1
            if not tail.followers:
                self._tails.pop(job_id, None)

    async def _next(self, tail: _Tail, caller: Caller, job_id: str, after: int) -> list[Told] | None:
        """What follows `after`, None while the database is away. Of all who are at the end, one reads for all; whoever is behind
        reads alone until then."""
        try:
            if not tail.since(after):
                async with tail.reading:
                    await self._refresh(tail, caller, job_id)
            remembered = tail.since(after)
            return (await self._read(caller, job_id, after))[1] if remembered is None else remembered
        except Exception as error:
            if not db.is_outage(error):
                raise
            return None

    async def _refresh(self, tail: _Tail, caller: Caller, job_id: str) -> None:
        while tail.is_stale:
            tail.is_stale = False  # before the rows are read: what comes in between makes it stale again
            try:
                head, new, is_over = await self._read(caller, job_id, tail.head)
            except BaseException:
                tail.is_stale = True
                raise
            tail.add(new, after=head, is_over=is_over)
            tail.is_stale |= len(new) == AT_ONCE

    async def _read(self, caller: Caller, job_id: str, after: int | None) -> tuple[int, list[Told], bool]:
        return await run_in_threadpool(self._rows, caller, job_id, after)

    def _rows(self, caller: Caller, job_id: str, after: int | None) -> tuple[int, list[Told], bool]:
        """Behind which event, by default the last that there is; what follows it; and whether no more will come.

        The state is read first, since a job's last event is written with its end.
        """
        with db.organization_session(self._sessions, caller.organization_id) as session:
            state, count = session.execute(select(Job.state, Job.event_count).where(Job.id == job_id)).one()
            after = count if after is None else after
            mine = JobEvent.organization_id == caller.organization_id, JobEvent.job_id == job_id, JobEvent.sequence > after
            found = session.scalars(select(JobEvent).where(*mine).order_by(JobEvent.sequence).limit(AT_ONCE))
            return after, [Told.of(event) for event in found], state in TERMINAL

    def _wake_all(self) -> None:
        for tail in self._tails.values():
            tail.wake()

    def _say_waiting(self, error: Exception) -> None:
        """Once: that an outage lasts is no news every second."""
        if not self._has_said_waiting:
            log.warning("feed_waits_for_database", error=type(error).__name__)
            self._has_said_waiting = True
