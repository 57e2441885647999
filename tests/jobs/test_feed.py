"""A job's events as a stream: every one once and in order, from wherever a client left off, however many there are."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import psycopg
import pytest
from openai import OpenAI, Stream
from pydantic import SecretStr
from sqlalchemy import event, orm, select

from app import db
from app.accounts.caller import Caller
from app.core.settings import Settings
from app.jobs import events, feed
from app.jobs import service as jobs
from app.jobs.feed import Feed
from app.models import Job
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker.embedded import Servers

Sessions = orm.sessionmaker[orm.Session]
FOLLOWERS = 40


@dataclass
class Follower:
    """What one client has been told: ids and sequences, until `[DONE]` or until it leaves."""

    ids: list[str] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    is_done: bool = False

    def follow(self, http: httpx.Client, job_id: str, *, most: int = 10**9, cursor: str | None = None) -> "Follower":
        headers = {"Last-Event-ID": cursor} if cursor else {}
        with http.stream("GET", path(job_id), params={"stream": "true"}, headers=headers, timeout=PATIENCE_SECONDS) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    self.ids.append(line.removeprefix("id: "))
                elif line == "data: [DONE]":
                    self.is_done = True
                elif line.startswith("data: "):
                    self.sequences.append(json.loads(line.removeprefix("data: "))["sequence"])
                    if len(self.sequences) >= most:
                        break
        return self


def path(job_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{job_id}/events"


@pytest.fixture
def job_id(system_sessions: Sessions, organization: Caller) -> str:
    with system_sessions.begin() as session:
        return make.queued_job(session, organization).id


def say(sessions: Sessions, job_id: str, *words: str) -> None:
    """In one transaction."""
    with sessions.begin() as session:
        job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
        for word in words:
            events.append(session, job, word)


def end(sessions: Sessions, organization: Caller, job_id: str) -> int:
    """The number of events of the job, which is over."""
    with sessions.begin() as session:
        return jobs.cancel(session, organization, job_id).event_count


def test_a_job_that_is_over_is_told_whole_and_the_stream_ends(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    say(system_sessions, job_id, *map(str, range(450)))
    count = end(system_sessions, organization, job_id)
    told = Follower().follow(http, job_id)

    assert told.sequences == list(range(1, count + 1)) and told.is_done
    listed = http.get(path(job_id), params={"limit": 3}).json()["data"]
    assert [event["id"] for event in listed] == told.ids[:-4:-1]


def test_a_client_goes_on_where_it_left_off(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    say(system_sessions, job_id, *map(str, range(20)))
    first = Follower().follow(http, job_id, most=7)
    say(system_sessions, job_id, *map(str, range(20)))
    count = end(system_sessions, organization, job_id)
    rest = Follower().follow(http, job_id, cursor=first.ids[6])

    assert first.sequences[:7] + rest.sequences == list(range(1, count + 1))
    assert Follower().follow(http, job_id, cursor="ftevent-nobody-knows").sequences == list(range(1, count + 1))


def test_the_sdk_reads_it_as_it_reads_every_stream(
    client: OpenAI, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    count = end(system_sessions, organization, job_id)
    asked = f"/fine_tuning/jobs/{job_id}/events?stream=true"
    told = list(client.get(asked, cast_to=dict[str, object], stream=True, stream_cls=Stream[dict[str, object]]))

    assert [event["sequence"] for event in told] == list(range(1, count + 1))


def test_all_who_follow_are_told_everything_as_it_comes(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    followers = [Follower() for _ in range(FOLLOWERS)]
    with ThreadPoolExecutor(FOLLOWERS) as threads:
        following = [threads.submit(follower.follow, http, job_id) for follower in followers]
        eventually(lambda: all(follower.sequences for follower in followers))
        for number in range(60):
            say(system_sessions, job_id, *map(str, range(number % 4 + 1)))
        count = end(system_sessions, organization, job_id)
        for one in following:
            one.result(timeout=PATIENCE_SECONDS)

    assert all(follower.sequences == list(range(1, count + 1)) and follower.is_done for follower in followers)


def test_an_event_is_there_at_once(
    http: httpx.Client, system_sessions: Sessions, organization: Caller, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For it is told of, and nobody looks but then."""
    monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 1000.0)
    follower = Follower()
    with following(follower, http, job_id):
        eventually(lambda: follower.sequences)
        known = len(follower.sequences)
        time.sleep(0.3)
        say(system_sessions, job_id, "now")
        eventually(lambda: len(follower.sequences) > known)
        end(system_sessions, organization, job_id)


def test_a_listener_that_loses_its_connection_loses_no_event(
    http: httpx.Client,
    servers: Servers,
    system_sessions: Sessions,
    organization: Caller,
    job_id: str,
) -> None:
    follower = Follower()
    listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN tunesmith_events'"
    with psycopg.connect(servers.superuser_dsn, autocommit=True) as superuser, following(follower, http, job_id):
        eventually(lambda: follower.sequences)
        for number in range(8):
            eventually(lambda: superuser.execute(listening).rowcount)
            say(system_sessions, job_id, str(number))
            time.sleep(0.1)
        count = end(system_sessions, organization, job_id)

    assert follower.sequences == list(range(1, count + 1)) and follower.is_done


def test_who_is_behind_when_the_database_goes_away_hears_that_we_live_and_then_the_rest(
    settings: Settings, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    say(system_sessions, job_id, *map(str, range(450)))
    count = end(system_sessions, organization, job_id)
    nowhere = SecretStr(f"postgresql+psycopg://a:b@127.0.0.1:{make.free_port()}/c")
    sessions, absent = db.open_sessions(settings.database.api_url), db.open_sessions(nowhere)
    there = sessions.kw["bind"]

    async def told() -> list[bytes]:
        stream = Feed(sessions, settings.database.api_url).follow(organization, job_id, after=0)
        first = await anext(stream)
        sessions.configure(bind=absent.kw["bind"])
        meanwhile = [await anext(stream) for _ in range(2)]
        sessions.configure(bind=there)
        return [first, *meanwhile, *[chunk async for chunk in stream]]

    first, *meanwhile, second, third, last = asyncio.run(told())
    there.dispose()
    assert [chunk.count(b"\ndata: ") for chunk in (first, second, third)] == [200, 200, count - 400]
    assert (meanwhile, last) == ([feed.KEEP_ALIVE] * 2, feed.DONE)


def test_before_the_first_byte_no_more_is_read_than_is_told(
    settings: Settings, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    say(system_sessions, job_id, *map(str, range(450)))
    sessions, asked = db.open_sessions(settings.database.api_url), list[str]()
    event.listen(sessions.kw["bind"], "before_cursor_execute", lambda *about: asked.append(about[2]))

    async def first() -> bytes:
        return await anext(Feed(sessions, settings.database.api_url).follow(organization, job_id, after=0))

    assert asyncio.run(first()).count(b"\ndata: ") == 200
    sessions.kw["bind"].dispose()
    assert len([statement for statement in asked if "FROM job_events" in statement]) == 2


def test_an_event_that_nobody_was_notified_of_is_found(
    settings: Settings,
    api_sessions: Sessions,
    system_sessions: Sessions,
    organization: Caller,
    job_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that listens may be dead without knowing it. Here none listens."""
    monkeypatch.setattr(feed, "KEEP_ALIVE_SECONDS", 0.1)

    async def told() -> list[bytes]:
        stream = Feed(api_sessions, settings.database.api_url).follow(organization, job_id, after=0)
        said = [await anext(stream) for _ in range(2)]
        end(system_sessions, organization, job_id)
        async with asyncio.timeout(30):
            return [*said, *[chunk async for chunk in stream if chunk != feed.KEEP_ALIVE]]

    before, silence, *after = asyncio.run(told())
    assert silence == feed.KEEP_ALIVE and b"data: " in before
    assert b"cancelled" in after[0] and after[-1] == feed.DONE


def test_a_stranger_follows_nothing(api_url: str, stranger: OpenAI, job_id: str) -> None:
    headers = {"Authorization": f"Bearer {stranger.api_key}"}
    answer = httpx.get(f"{api_url}{path(job_id)}?stream=true", headers=headers, timeout=PATIENCE_SECONDS)

    assert make.require_envelope(answer.status_code, answer.json())["code"] == "job_not_found"


class following:
    """In a thread; the block's end waits for the stream's."""

    def __init__(self, follower: Follower, http: httpx.Client, job_id: str) -> None:
        self._thread = threading.Thread(target=follower.follow, args=(http, job_id))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=PATIENCE_SECONDS)
        assert not self._thread.is_alive()
