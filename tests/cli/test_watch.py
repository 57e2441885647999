"""Whoever watches sees all of it, whatever breaks off and however often they leave; the job does not notice."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from openai import OpenAI
from sqlalchemy import orm

from app.accounts.caller import Caller
from app.core import events
from app.core.events import Evaluated
from app.jobs import leases
from app.jobs import service as jobs
from app.models import Job
from bench.chaos.proxy import Proxy, serving
from cli.account import Account
from cli.api import Api
from cli.jobs.watch import Event, Json, watch
from tests import make
from tests.cli.conftest import Tunesmith
from tests.cli.terminal import terminal
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from tests.jobs.test_comparing import finished_job, stepped
from tests.jobs.test_feed import end, say

Sessions = orm.sessionmaker[orm.Session]


@pytest.fixture
def job_id(system_sessions: Sessions, organization: Caller) -> str:
    with system_sessions.begin() as session:
        return make.queued_job(session, organization).id


def test_a_job_that_is_over_is_told_in_lines(tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        job = finished_job(session, organization, (2.0, 1.5, 1.8))
        job_id, became = job.id, job.fine_tuned_model
    said = tunesmith("jobs", "watch", job_id)
    words = [line.partition("  ")[2] for line in said.out.splitlines()[1:-1]]

    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"{job_id}: succeeded: {became}\n")
    assert "Step 6/6: training loss=0.5000, 10 tokens/s" in words and "Step 4: validation loss=1.5000" in words
    assert f"New fine-tuned model created: {became}" in said.out


def test_a_job_that_fails_is_status_1_and_says_why(tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller) -> None:
    with system_sessions.begin() as session:
        job = make.queued_job(session, organization)
        leases.fail(session, make.claim(session, job), code="invalid_file", message="line 3 is odd")
        job_id = job.id
    said = tunesmith("jobs", "watch", job_id)

    assert (said.status, said.err) == (1, f"tunesmith: {job_id} has failed: line 3 is odd\n")


@dataclass
class Watcher(Json):
    """A Teller that only remembers."""

    told: list[Event] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        self.told.append(event)

    def trouble(self, why: str) -> None:
        self.troubles.append(why)


def test_every_event_is_told_once_while_the_service_comes_and_goes(
    client: OpenAI, api_url: str, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    """Connections break off again and again, and every other time nobody is there for a while."""
    port, is_away, watcher = urlsplit(api_url).port or 0, threading.Event(), Watcher()
    proxy = Proxy(lambda: make.free_port() if is_away.is_set() else port)
    with serving(proxy), Api(Account(f"http://127.0.0.1:{proxy.port}/v1", client.api_key, "a test")) as api:
        job = api.get(f"/fine_tuning/jobs/{job_id}")
        with ThreadPoolExecutor(1) as threads:
            watching = threads.submit(watch, api, job, watcher)
            for number in range(6):
                say(system_sessions, job_id, *(f"{number}.{part}" for part in range(5)))
                eventually(lambda: watcher.told and watcher.told[-1]["message"] == f"{number}.4")  # noqa: B023
                troubles = len(watcher.troubles)
                if number % 2:
                    is_away.set()
                proxy.reset()
                say(system_sessions, job_id, f"meanwhile {number}")
                eventually(lambda: len(watcher.troubles) > troubles)  # noqa: B023
                is_away.clear()
            count = end(system_sessions, organization, job_id)
            status = watching.result(timeout=PATIENCE_SECONDS)

    assert status == 1  # it was cancelled
    assert [event["sequence"] for event in watcher.told] == list(range(1, count + 1)) and count > 36


def test_a_program_goes_on_behind_the_event_it_knows(
    tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    say(system_sessions, job_id, *map(str, range(20)))
    count = end(system_sessions, organization, job_id)
    told = [json.loads(line) for line in tunesmith("jobs", "watch", job_id, "--json").out.splitlines()]
    rest = tunesmith("jobs", "watch", job_id, "--json", "--after", told[9]["id"])

    assert [event["sequence"] for event in told] == list(range(1, count + 1))
    assert list(map(json.loads, rest.out.splitlines())) == told[10:]


def test_a_watch_is_stopped_and_started_and_the_job_does_not_notice(
    tunesmith: Tunesmith, system_sessions: Sessions, organization: Caller, job_id: str
) -> None:
    """On a terminal, where it is a picture."""
    with system_sessions.begin() as session:
        lease = make.claim(session, session.get_one(Job, job_id))
        said: list[events.Event] = [*(stepped(step, 3.0 / step) for step in range(1, 4))]
        leases.heartbeat(
            session, lease, [*said, Evaluated(step=3, valid_loss=1.25, valid_mean_token_accuracy=0.4)], settings=make.LEASES
        )
    before = state_of(system_sessions, job_id)
    with terminal("jobs", "watch", job_id) as screen:
        screen.shows("validation")
        screen.interrupt()
        assert screen.status() == 130
        seen = " ".join(screen.seen.split())

    assert "step 3/6" in seen and "1.2500" in seen and "█" in seen and "tokens/s" in seen
    assert f"{job_id} goes on; watch it again: tunesmith jobs watch {job_id}" in seen
    assert state_of(system_sessions, job_id) == before

    with system_sessions.begin() as session:
        jobs.cancel(session, organization, job_id)
        leases.stop(session, lease)
    again = tunesmith("jobs", "watch", job_id)
    assert again.status == 1 and "Step 3: validation loss=1.2500" in again.out


def test_a_job_that_is_not_there_is_told_in_a_line(tunesmith: Tunesmith) -> None:
    said = tunesmith("jobs", "watch", "ftjob-nobody")

    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)


def test_making_and_watching_is_one_command(
    tunesmith: Tunesmith, client: OpenAI, system_sessions: Sessions, organization: Caller, file_id: str
) -> None:
    def cancel() -> None:
        eventually(lambda: client.fine_tuning.jobs.list().data)
        client.fine_tuning.jobs.cancel(client.fine_tuning.jobs.list().data[0].id)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    said = tunesmith("jobs", "create", file_id, "--model", make.TINY, "--watch", "--json")
    canceller.join()
    job, *told = (json.loads(line) for line in said.out.splitlines())

    assert said.status == 1
    assert job["object"] == "fine_tuning.job" and {event["object"] for event in told} == {"fine_tuning.job.event"}


def state_of(sessions: Sessions, job_id: str) -> tuple[str, str, int]:
    with sessions() as session:
        job = session.get_one(Job, job_id)
        return job.state, job.desired, job.event_count
