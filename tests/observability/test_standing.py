"""What the relay and `tunesmith status` read of the database, on rows that are made for it."""

import time
from collections.abc import Callable
from datetime import timedelta

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from pydantic import SecretStr
from sqlalchemy import event, func, null, orm, select
from structlog.testing import capture_logs

from app import db, processes, standing
from app.accounts.caller import Caller
from app.core import catalog
from app.core.settings import MetricsSettings, Settings
from app.core.storage import Storage
from app.models import File, FileStatus, Job, Process, WebhookDelivery, WebhookEndpoint
from app.standing import Standing
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker import metrics
from worker.broker import Polls
from worker.services import Services
from worker.standing import StandingCollector
from worker.tasks import vitals

Sessions = orm.sessionmaker[orm.Session]
AGO = timedelta(seconds=100)


@pytest.fixture
def read(system_sessions: Sessions) -> Callable[[], Standing]:
    def once() -> Standing:
        with system_sessions.begin() as session:
            return standing.read(session, engine_timeout_seconds=15)

    return once


def queued(session: orm.Session, organization: Caller) -> Job:
    """In a queue of its own."""
    job = make.queued_job(session, organization)
    job.queue = f"train.{job.id}"
    session.flush()
    return job


def test_what_may_be_claimed_waits_since_it_may_be(
    read: Callable[[], Standing], system_sessions: Sessions, organization: Caller
) -> None:
    with system_sessions.begin() as session:
        job, later, paused = (queued(session, organization) for _ in range(3))
        job.queued_at, job.not_before = func.clock_timestamp() - 5 * AGO, func.clock_timestamp() - AGO
        later.not_before = func.clock_timestamp() + AGO
        paused.desired = "pause"
    found = read().queues

    assert found[job.queue].count == 1
    assert 100 <= found[job.queue].oldest_seconds < 160
    assert later.queue not in found and paused.queue not in found


def test_a_silent_lease_and_every_attempt_are_counted(
    read: Callable[[], Standing], system_sessions: Sessions, organization: Caller
) -> None:
    before = read()
    with system_sessions.begin() as session:
        job = queued(session, organization)
        make.claim(session, job)
    running = read()
    with system_sessions.begin() as session:
        make.expire_lease(session, session.get_one(Job, job.id))
    silent = read()

    assert running.attempts == before.attempts + 1
    assert running.jobs["running"] == before.jobs["running"] + 1
    assert (running.leases_expired, silent.leases_expired) == (before.leases_expired, before.leases_expired + 1)


def test_webhooks_wait_are_due_or_were_given_up(
    read: Callable[[], Standing], system_sessions: Sessions, organization: Caller
) -> None:
    before = read().webhooks
    with system_sessions.begin() as session:
        endpoints = [_endpoint(session, organization, is_enabled=is_enabled) for is_enabled in (True, False)]
        for number, endpoint in enumerate(endpoints):
            for state in ("due", "later", "given_up"):
                _delivery(session, organization, endpoint, f"evt_{number}{state}", state)
    after = read().webhooks
    with system_sessions.begin() as session:
        for endpoint in endpoints:
            session.delete(session.get_one(WebhookEndpoint, endpoint))

    assert after.waiting == before.waiting + 2
    assert after.due.count == before.due.count + 1 and after.due.oldest_seconds >= 100
    assert after.exhausted == before.exhausted + 2
    assert after.disabled_endpoints == before.disabled_endpoints + 1


def test_a_message_that_its_endpoint_is_spared_is_not_due(
    read: Callable[[], Standing], system_sessions: Sessions, organization: Caller
) -> None:
    before = read().webhooks
    with system_sessions.begin() as session:
        endpoint = _endpoint(session, organization, is_enabled=True)
        session.get_one(WebhookEndpoint, endpoint).not_before = func.clock_timestamp() + AGO
        _delivery(session, organization, endpoint, "evt_spared", "due")
    resting = read().webhooks
    with system_sessions.begin() as session:
        session.get_one(WebhookEndpoint, endpoint).not_before = func.clock_timestamp() - AGO / 2
    rested = read().webhooks
    with system_sessions.begin() as session:
        session.delete(session.get_one(WebhookEndpoint, endpoint))

    assert (resting.waiting, resting.due.count) == (before.waiting + 1, before.due.count)
    assert rested.due.count == before.due.count + 1
    assert before.due.count or 50 <= rested.due.oldest_seconds < 100


def test_a_job_waits_for_the_cpu_once_its_file_has_been_read(
    read: Callable[[], Standing], system_sessions: Sessions, organization: Caller
) -> None:
    before = read().queues["cpu"].count
    with system_sessions.begin() as session:
        file = make.uploaded_file(session, organization)
        job = make.job(session, organization, training_file=file)
    uploaded = read().queues["cpu"].count
    with system_sessions.begin() as session:
        session.get_one(File, file.id).status = FileStatus.PROCESSED
    validated = read().queues["cpu"].count
    with system_sessions.begin() as session:
        session.get_one(Job, job.id).not_before = func.clock_timestamp() + AGO
    in_hand = read().queues["cpu"].count

    assert (uploaded, validated, in_hand) == (before + 1, before + 1, before)


def test_a_process_lives_while_it_says_so(system_sessions: Sessions) -> None:
    def live() -> dict[str, Process]:
        with system_sessions.begin() as session:
            return {process.id: process for process in processes.list_live(session)}

    with system_sessions.begin() as session:
        processes.record(session, "host:1", kind="train", queues=("train.cpu",), broker_seconds=30)
        processes.record(session, "host:1", kind="train", queues=("train.cpu",), broker_seconds=40)
        processes.record(session, "host:2", kind="relay", broker_seconds=0)
    told = live()["host:1"]
    assert told.heartbeat_at - told.broker_at == timedelta(seconds=40)
    with system_sessions.begin() as session:
        session.get_one(Process, "host:1").heartbeat_at = func.clock_timestamp() - AGO
    assert "host:1" not in live() and "host:2" in live()
    with system_sessions.begin() as session:
        session.get_one(Process, "host:1").heartbeat_at = func.clock_timestamp() - timedelta(days=2)
        session.flush()
        processes.record(session, "host:3", kind="relay", broker_seconds=0)
        assert session.scalars(select(Process.id).where(Process.id == "host:1")).all() == []


def test_a_beat_that_the_database_refuses_is_not_the_last(
    settings: Settings, api_sessions: Sessions, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.01)
    with capture_logs() as said:
        beat = vitals.Beat(Services(settings, api_sessions, storage, catalog.load()), "cpu", ["cpu"])
        eventually(lambda: [line["error"] for line in said if line["event"] == "vitals_not_told"][1:])
        beat.stop()

    assert {line["error"] for line in said} == {"ProgrammingError"}


def test_while_the_database_is_away_that_is_all_that_is_told() -> None:
    sessions = db.open_sessions(SecretStr(f"postgresql+psycopg://nobody@127.0.0.1:{make.free_port()}/nowhere"))
    registry = CollectorRegistry()
    registry.register(StandingCollector(sessions, engine_timeout_seconds=1))
    told = generate_latest(registry).decode()

    assert "tunesmith_database_up 0.0" in told and "tunesmith_jobs" not in told


def test_a_database_that_is_away_is_asked_no_oftener_than_one_that_answers() -> None:
    sessions = db.open_sessions(SecretStr(f"postgresql+psycopg://nobody@127.0.0.1:{make.free_port()}/nowhere"))
    failures = list[object]()
    event.listen(sessions.kw["bind"], "handle_error", failures.append)
    collector = StandingCollector(sessions, engine_timeout_seconds=1)
    for _ in range(2):
        (up,) = collector.collect()
        assert up.samples[0].value == 0

    assert len(failures) == 1


def test_many_who_ask_cost_the_database_no_more_than_one(
    system_sessions: Sessions, organization: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.standing.FRESH_SECONDS", PATIENCE_SECONDS)
    collector = StandingCollector(system_sessions, engine_timeout_seconds=1)
    first = next(family for family in collector.collect() if family.name == "tunesmith_jobs")
    with system_sessions.begin() as session:
        queued(session, organization)
    second = next(family for family in collector.collect() if family.name == "tunesmith_jobs")

    assert first.samples == second.samples


def test_a_worker_at_work_is_not_silent() -> None:
    polls = Polls()
    asked = polls.silent_seconds
    polls.look_begins()
    assert polls.silent_seconds == 0.0 < asked
    before = time.monotonic()
    polls.look_ends()
    assert 0.0 < polls.silent_seconds <= time.monotonic() - before


def test_a_port_that_is_taken_stops_nobody() -> None:
    registry = CollectorRegistry()
    Gauge("mine", "Mine", registry=registry).set(7)
    settings = MetricsSettings(port=make.free_port())
    metrics.serve(settings, registry)
    metrics.serve(settings, CollectorRegistry())

    assert "mine 7.0" in httpx.get(f"http://127.0.0.1:{settings.port}/metrics", verify=False, timeout=PATIENCE_SECONDS).text


def _endpoint(session: orm.Session, caller: Caller, *, is_enabled: bool) -> str:
    made = WebhookEndpoint(
        id=f"we_{caller.organization_id}{is_enabled}",
        organization_id=caller.organization_id,
        project_id=caller.project_id,
        name="a",
        url="http://127.0.0.1:9/",
        event_types=[],
        secret="whsec_",
        is_enabled=is_enabled,
    )
    session.add(made)
    session.flush()
    return made.id


def _delivery(session: orm.Session, caller: Caller, endpoint_id: str, event_id: str, state: str) -> None:
    next_at = {"due": func.clock_timestamp() - AGO, "later": func.clock_timestamp() + AGO, "given_up": null()}[state]
    session.add(
        WebhookDelivery(
            id=f"msg_{endpoint_id}{event_id}",
            organization_id=caller.organization_id,
            project_id=caller.project_id,
            endpoint_id=endpoint_id,
            event_id=event_id,
            event_type="fine_tuning.job.failed",
            body="{}",
            next_attempt_at=next_at,
        )
    )
