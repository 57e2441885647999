"""How soon 500 clients that follow 50 jobs are told of what is committed, and whether all of them are told all of it.

    PYTHONPATH=. python bench/events.py [--quick] [--json FILE]

Postgres and one API process are started. Events are committed at 20 a second; each goes to the ten who follow its job. Five
clients a second lose their connection and come back with `Last-Event-ID`, and half-way the API process gets SIGKILL. Delay is
counted from before the commit to the client's line, without the deliveries that the killed API held up.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from api import Api, api
from sqlalchemy import orm, select

from app import db
from app.core.settings import MIB
from app.jobs import events
from app.jobs import service as jobs
from app.models import Job
from tests import make

FOLLOWERS, JOBS, EVENTS_PER_SECOND, LOST_PER_SECOND = 500, 50, 20, 5
P95_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
Committed = dict[tuple[str, int], float]  # by job and sequence


@dataclass
class Follower:
    """One client: sequences with the time at which each came, however often its connection was lost.

    It reads lines from a socket: five hundred clients of a library would take more of the machine than what is measured.
    """

    at: Api
    job_id: str
    told: list[tuple[int, float]] = field(default_factory=list)
    connected_at: float = 0.0
    is_done: bool = False
    _cursor: str = ""

    async def follow(self) -> None:
        while not self.is_done:
            with suppress(OSError):
                await self._listen()
            if not self.is_done:
                await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _listen(self) -> None:
        url = urlsplit(self.at.url)
        lines, connection = await asyncio.open_connection(url.hostname, url.port)
        try:
            cursor = f"Last-Event-ID: {self._cursor}\r\n" if self._cursor else ""
            asked = f"GET /v1/fine_tuning/jobs/{self.job_id}/events?stream=true HTTP/1.1\r\nHost: {url.netloc}\r\n{cursor}"
            connection.write(f"{asked}Authorization: Bearer {self.at.key}\r\n\r\n".encode())
            if not (await lines.readline()).startswith(b"HTTP/1.1 200"):
                return
            self.connected_at = time.monotonic()
            await self._hear(lines)
        finally:
            connection.close()

    async def _hear(self, lines: asyncio.StreamReader) -> None:
        """To the end. What is neither an id nor data is of the transport: headers, and the lengths of chunks."""
        event_id = ""
        async for line in lines:
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                event_id = value
            elif name == "data" and value == "[DONE]":
                self.is_done = True
                return
            elif name == "data":
                self.told.append((json.loads(value)["sequence"], time.monotonic()))
                self._cursor = event_id


@dataclass(frozen=True)
class Life:
    """Of one API process, from when everybody was connected."""

    cpu_seconds: float
    grown_mib: float


@dataclass
class Watch:
    """What a process takes."""

    process: psutil.Process

    def __post_init__(self) -> None:
        self._cpu_seconds, self._rss_bytes = self._now()

    def life(self) -> Life:
        cpu_seconds, rss_bytes = self._now()
        return Life(cpu_seconds - self._cpu_seconds, (rss_bytes - self._rss_bytes) / MIB)

    def _now(self) -> tuple[float, int]:
        times = self.process.cpu_times()
        return times.user + times.system, self.process.memory_info().rss


class Crowd:
    """All clients. One that loses its connection goes on by itself."""

    def __init__(self, at: Api, job_ids: Sequence[str]) -> None:
        self.all = [Follower(at, job_ids[number % len(job_ids)]) for number in range(FOLLOWERS)]
        self._tasks = [self._started(follower) for follower in self.all]

    async def lose(self, number: int) -> None:
        """In the middle of whatever comes just now."""
        self._tasks[number].cancel()
        await asyncio.gather(self._tasks[number], return_exceptions=True)
        self._tasks[number] = self._started(self.all[number])

    async def connected(self, *, since: float) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not all(follower.connected_at > since and follower.told for follower in self.all):
                await asyncio.sleep(0.05)

    async def done(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*self._tasks)

    def _started(self, follower: Follower) -> "asyncio.Task[None]":
        return asyncio.create_task(follower.follow())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 seconds of events instead of 30")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, api(Path(folder) / "data") as at:
        told = asyncio.run(_measured(at, seconds=10 if asked.quick else 30))
    for target in told["targets"]:
        verdict = "met" if target["ok"] else "MISSED"
        print(f"{target['name']:50} {target['value']:7.3f}   target {target['target']:g}: {verdict}")
    print("\n".join(f"{name:50} {value:7.3f}" for name, value in told.items() if name != "targets"))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=2) + "\n")


async def _measured(at: Api, *, seconds: float) -> dict[str, Any]:
    sessions = db.open_sessions(at.settings.database.system_url)
    with sessions.begin() as session:
        job_ids = [make.queued_job(session, at.caller).id for _ in range(JOBS)]
    crowd, committed = Crowd(at, job_ids), Committed()
    await crowd.connected(since=0)
    before = await _busy(at, crowd, sessions, committed, seconds=seconds / 2)
    killed_at = time.monotonic()
    at.process().send_signal(signal.SIGKILL)
    committing = asyncio.create_task(_commit(sessions, crowd, committed, seconds=2))
    await crowd.connected(since=killed_at)
    back_at = time.monotonic()
    await committing
    after = await _busy(at, crowd, sessions, committed, seconds=seconds / 2)
    counts = await asyncio.to_thread(_end, at, sessions, job_ids)
    await crowd.done()
    wrong = [one for one in crowd.all if [sequence for sequence, _ in one.told] != list(range(1, counts[one.job_id] + 1))]
    delays = sorted(_delays(crowd.all, committed, killed_at=killed_at, back_at=back_at))
    p50, p95, p99 = (statistics.quantiles(delays, n=100)[part - 1] for part in (50, 95, 99))
    return {
        "targets": [
            {"name": "clients with a gap or a double", "value": len(wrong), "target": 0, "ok": not wrong},
            {"name": "commit to client, p95 in seconds", "value": p95, "target": P95_SECONDS, "ok": p95 <= P95_SECONDS},
        ],
        "commit to client, p50 in seconds": p50,
        "commit to client, p99 in seconds": p99,
        "commit to client, the longest in seconds": delays[-1],
        "deliveries": len(delays),
        "all clients back after SIGKILL of the API, seconds": back_at - killed_at,
        "API, CPU seconds a second": (before.cpu_seconds + after.cpu_seconds) / seconds,
        "API, growth in MiB before it was killed": before.grown_mib,
        "API, growth in MiB afterwards": after.grown_mib,
    }


async def _busy(at: Api, crowd: Crowd, sessions: orm.sessionmaker[orm.Session], committed: Committed, *, seconds: float) -> Life:
    watch = Watch(at.process())
    await _commit(sessions, crowd, committed, seconds=seconds)
    return watch.life()


async def _commit(sessions: orm.sessionmaker[orm.Session], crowd: Crowd, committed: Committed, *, seconds: float) -> None:
    """At an even pace, whatever each commit takes; and connections are lost."""
    began_at = time.monotonic()
    for number in range(round(seconds * EVENTS_PER_SECOND)):
        await asyncio.sleep(began_at + number / EVENTS_PER_SECOND - time.monotonic())
        job_id, step = random.choice(crowd.all).job_id, number + 1
        await asyncio.to_thread(_say, sessions, job_id, step, committed)
        if number % (EVENTS_PER_SECOND // LOST_PER_SECOND) == 0:
            await crowd.lose(random.randrange(FOLLOWERS))


def _say(sessions: orm.sessionmaker[orm.Session], job_id: str, step: int, committed: Committed) -> None:
    with sessions.begin() as session:
        job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
        data = {"step": step, "train_loss": random.random(), "train_mean_token_accuracy": random.random()}
        events.append(session, job, f"Step {step}/1000: training loss={data['train_loss']:.4f}", type="metrics", data=data)
        session.flush()
        committed[job_id, job.event_count] = time.monotonic()


def _end(at: Api, sessions: orm.sessionmaker[orm.Session], job_ids: Sequence[str]) -> dict[str, int]:
    """The number of events of each job, all of which are over."""
    with sessions.begin() as session:
        return {job_id: jobs.cancel(session, at.caller, job_id).event_count for job_id in job_ids}


def _delays(followers: Sequence[Follower], committed: Committed, *, killed_at: float, back_at: float) -> list[float]:
    """Of what came while the API was there all the time from the commit on."""
    received = (
        (committed[one.job_id, sequence], told_at)
        for one in followers
        for sequence, told_at in one.told
        if (one.job_id, sequence) in committed
    )
    return [told_at - said_at for said_at, told_at in received if told_at < killed_at or said_at > back_at]


if __name__ == "__main__":
    main()
