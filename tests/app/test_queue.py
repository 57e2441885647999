"""`GET /v1/queue`, and what a waiting job says of its place."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import func, orm

from app.accounts.caller import Caller
from app.core import ids
from app.jobs import leases, schemas
from app.models import Job, JobState, Throughput
from tests import make
from tests.conftest import make_organization

Sessions = orm.sessionmaker[orm.Session]
Queue = Callable[[], dict[str, Any]]


@pytest.fixture
def name(system_sessions: Sessions) -> str:
    """A queue that no other test waits in, and where a job of 1,000 tokens takes ten seconds."""
    made = f"train.{ids.new('q')}"
    with system_sessions.begin() as session:
        session.add(Throughput(id=ids.new("tp_"), queue=made, base=make.TINY, tokens=1000, worker_seconds=10.0))
    return made


@pytest.fixture
def shown(http: httpx.Client, name: str) -> Queue:
    """The queue as the client is told of it now."""

    def ask() -> dict[str, Any]:
        answer = http.get("/v1/queue").raise_for_status().json()
        return next(queue for queue in answer["data"] if queue["id"] == name)

    return ask


def wait_in(sessions: Sessions, caller: Caller, name: str, **changes: object) -> str:
    with sessions.begin() as session:
        job = make.queued_job(session, caller)
        job.queue, job.total_tokens = name, 1000
        for column, value in changes.items():
            setattr(job, column, value)
        return job.id


def claim(sessions: Sessions, name: str) -> str:
    with sessions.begin() as session:
        lease = leases.claim(session, name, owner="w", settings=make.LEASES)
        assert lease is not None
        return lease.job_id


def test_a_waiting_job_tells_its_place_until_it_is_taken(
    client: OpenAI, shown: Queue, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    ids = [wait_in(system_sessions, organization, name) for _ in range(2)]
    at_once = {job.id: job for job in client.fine_tuning.jobs.list()}
    first, second = (at_once[job_id] for job_id in ids)
    places = [(job.model_extra or {})["queue"] for job in (first, second)]

    assert [(place["name"], place["position"]) for place in places] == [(name, 1), (name, 2)]
    assert 9 <= places[1]["estimated_start"] - places[0]["estimated_start"] <= 11
    assert second.estimated_finish is not None and 9 <= second.estimated_finish - places[1]["estimated_start"] <= 11
    listed = {job.id: (job.model_extra or {})["queue"]["position"] for job in client.fine_tuning.jobs.list()}
    assert listed == {ids[0]: 1, ids[1]: 2}
    assert claim(system_sessions, name) == ids[0]
    taken, next_one = ((client.fine_tuning.jobs.retrieve(job_id).model_extra or {})["queue"] for job_id in ids)
    assert taken is None and next_one["position"] == 1
    told = [(job["id"], job["status"], job["position"]) for job in shown()["jobs"]]
    assert told == [(ids[0], "running", None), (ids[1], "queued", 1)]


def test_a_paused_job_has_no_place_and_a_resumed_one_has(
    client: OpenAI, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    job_id = wait_in(system_sessions, organization, name)

    assert (client.fine_tuning.jobs.pause(job_id).model_extra or {})["queue"] is None
    assert (client.fine_tuning.jobs.resume(job_id).model_extra or {})["queue"]["position"] == 1
    assert (client.fine_tuning.jobs.cancel(job_id).model_extra or {})["queue"] is None


def test_everybody_is_counted_and_nobody_else_is_named(
    http: httpx.Client, shown: Queue, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    other = make_organization(system_sessions)
    theirs = [wait_in(system_sessions, other, name) for _ in range(3)]
    assert claim(system_sessions, name) == theirs[0]
    mine = wait_in(system_sessions, organization, name)
    text, told = http.get("/v1/queue").text, shown()

    assert (told["waiting"], told["running"]) == (3, 1)
    assert [(job["id"], job["position"]) for job in told["jobs"]] == [(mine, 1)]
    assert not [
        secret for secret in (*theirs, other.organization_id, other.project_id, other.organization_slug) if secret in text
    ]


def test_another_project_of_the_same_organization_is_not_named_either(
    http: httpx.Client, shown: Queue, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    hidden = wait_in(system_sessions, organization, name, project_id="proj_another")

    assert shown()["jobs"] == [] and shown()["waiting"] == 1
    assert hidden not in http.get("/v1/queue").text


def test_where_the_next_job_would_stand_is_told(shown: Queue, name: str, organization: Caller, system_sessions: Sessions) -> None:
    for _ in range(2):
        wait_in(system_sessions, organization, name)
        wait_in(system_sessions, make_organization(system_sessions), name)
    told = shown()["next"]

    assert (told["name"], told["position"]) == (name, 5)
    assert told["estimated_start"] is not None


def test_every_tier_of_the_installation_is_there_with_or_without_jobs(http: httpx.Client) -> None:
    answer = http.get("/v1/queue").json()
    first = answer["data"][0]

    assert (answer["object"], answer["has_more"]) == ("list", False)
    assert [queue["id"] for queue in answer["data"]].count("train.cpu") == 1
    assert set(first) == {"id", "object", "tier", "waiting", "running", "next", "jobs", "has_more_jobs"}


def test_a_long_list_of_ones_own_is_cut_and_says_so(
    shown: Queue, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    first = wait_in(system_sessions, organization, name)
    with system_sessions.begin() as session:
        like = session.get_one(Job, first)
        columns = {key: getattr(like, key) for key in Job.__table__.columns.keys() if key not in {"id", "queued_at"}}  # noqa: SIM118
        for _ in range(schemas.MAX_LISTED):
            session.add(Job(**columns, id=ids.new("ftjob-"), queued_at=func.clock_timestamp()))
    told = shown()

    assert told["has_more_jobs"] is True and told["waiting"] == schemas.MAX_LISTED + 1
    assert [job["position"] for job in told["jobs"]] == list(range(1, schemas.MAX_LISTED + 1))
    assert all(job["status"] == JobState.QUEUED for job in told["jobs"])


def test_the_api_asks_for_places_of_no_organization_but_its_own(
    api_sessions: Sessions, name: str, organization: Caller, system_sessions: Sessions
) -> None:
    wait_in(system_sessions, organization, name)
    with api_sessions.begin() as session:  # a transaction that names no organization
        assert session.execute(func.queue_places([name]).select()).all() == []
