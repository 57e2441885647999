"""The real `wandb` library, in the process that the relay starts for it, against a server that takes what it sends."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import orm

from app.core import catalog
from app.core.settings import Settings, WandbSettings
from app.core.storage import Storage
from app.jobs.tracking import Due, Ending, Point, Run
from tests.embedded.patience import eventually
from tests.trackers.wandb_server import WandbServer, running
from worker.services import Services
from worker.trackers import wandb
from worker.trackers.failure import TrackerFailed

KEY = "local-" + "a" * 40
BEGAN = datetime.now(UTC) - timedelta(hours=5)
POINTS = tuple(Point(step, BEGAN + timedelta(seconds=step), {"train_loss": 1 / step}) for step in range(1, 8))
DUE = Due(
    follower_id="follow_1",
    claims=1,
    failures=0,
    job_id="ftjob-1",
    type="wandb",
    asked={"project": "mine", "tags": ["a"]},
    config={"spec": {"lora": {"rank": 8}}},
    started_at=BEGAN,
    run=None,
    step=-1,
    points=POINTS[:3],
    ending=None,
    has_more=False,
)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with running() as made:
        yield made


@pytest.fixture
def to(settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, server: WandbServer) -> Services:
    ours = WandbSettings(api_key=SecretStr(KEY), base_url=server.url)
    return Services(settings.model_copy(update={"wandb": ours}), system_sessions, storage, catalog.load())


def tell(to: Services, due: Due) -> Run:
    return asyncio.run(wandb.tell(due, to))


def test_a_run_that_is_told_again_holds_each_step_once(to: Services, server: WandbServer) -> None:
    began = time.time()
    run = tell(to, DUE)
    made = server.runs["ftjob-1"]
    assert run == Run("ftjob-1", f"{server.url}/us/mine/runs/ftjob-1") and not made.is_complete and made.exit_code is None
    tell(to, replace(DUE, points=POINTS[:5]))  # whoever was killed before it could note the first three
    ending = Ending("failed", BEGAN, {"status": "failed"}, "it diverged")
    tell(to, replace(DUE, points=POINTS[3:], ending=ending))

    assert [(line["_step"], line["train_loss"]) for line in made.history] == [(p.step, p.metrics["train_loss"]) for p in POINTS]
    assert [line["_timestamp"] for line in made.history] == [point.at.timestamp() for point in POINTS]
    assert made.config["spec"] == {"lora": {"rank": 8}} and made.about["tags"] == ["a"]
    assert (made.summary["status"], made.summary["error"]) == ("failed", "it diverged")
    assert made.is_complete and made.exit_code == 1
    assert (made.about["host"], made.about["program"]) == ("tunesmith", "tunesmith")  # and neither this machine's nor its code's
    assert server.paths == {"/graphql", "/files/us/mine/ftjob-1/file_stream", "/upload"}  # no telemetry
    eventually(lambda: not _services_since(began))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"base_url": "http://127.0.0.1:9"}, "it does not answer"), ({"api_key": SecretStr("short")}, "it refuses the key")],
)
def test_what_is_in_the_way_is_told_without_address_and_key(to: Services, changed: dict[str, object], reason: str) -> None:
    began = time.time()
    ours = to.settings.wandb.model_copy(update=changed)
    with pytest.raises(TrackerFailed, match=reason) as failure:
        tell(replace(to, settings=to.settings.model_copy(update={"wandb": ours})), DUE)

    assert "127.0.0.1" not in str(failure.value) and "short" not in str(failure.value)
    eventually(lambda: not _services_since(began))


def _services_since(instant: float) -> list[psutil.Process]:
    """The library's own processes that still run."""
    found = psutil.process_iter(["name", "create_time", "status"])
    return [
        one
        for one in found
        if one.info["name"] == "wandb-core" and one.info["create_time"] >= instant and one.info["status"] != psutil.STATUS_ZOMBIE
    ]
