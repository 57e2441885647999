"""From a job's events to a real MLflow server: real Postgres, time passing by ageing the cursor."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import delete, func, orm, select, update

from app.accounts.caller import Caller
from app.core import catalog, events
from app.core.settings import MlflowSettings, Settings
from app.core.storage import Storage
from app.jobs import leases, tracking
from app.jobs.leases import Lease
from app.models import Job, JobEvent, JobFollower
from tests import make
from tests.embedded.patience import PATIENCE_SECONDS, eventually
from worker.embedded import environment
from worker.services import Services
from worker.trackers import follow

NOWHERE = "http://127.0.0.1:9"
TELL_ONE = """
import asyncio
from app.core.settings import Settings
from worker.services import open_services
from worker.trackers import follow
asyncio.run(follow.tell_next(open_services(Settings()), "mlflow"))
"""


@pytest.fixture
def to(
    settings: Settings, system_sessions: orm.sessionmaker[orm.Session], storage: Storage, mlflow_url: str
) -> Iterator[Services]:
    """As the relay has them. What a test leaves to be told goes with it: a relay knows no tenants."""
    reporting = settings.model_copy(update={"mlflow": MlflowSettings(tracking_uri=mlflow_url, ui_url="https://mlflow.example")})
    yield Services(reporting, system_sessions, storage, catalog.load())
    with system_sessions.begin() as session:
        session.execute(delete(JobFollower))


@dataclass(frozen=True)
class Followed:
    """A job that reports to MLflow, and the words of its trainer."""

    to: Services
    id: str
    experiment: str

    def train(self, lease: Lease, *said: events.Event) -> None:
        with self.to.sessions.begin() as session:
            leases.heartbeat(session, lease, list(said), settings=make.LEASES)

    def claim(self) -> Lease:
        with self.to.sessions.begin() as session:
            job = session.get_one(Job, self.id)
            make.make_due(session, job)
            return make.claim(session, job)

    def look(self) -> None:
        """What a relay does once the cursor is due."""
        with self.to.sessions.begin() as session:
            mine = update(JobFollower).where(JobFollower.job_id == self.id, JobFollower.next_attempt_at.is_not(None))
            session.execute(mine.values(next_attempt_at=func.clock_timestamp() - timedelta(seconds=1)))
        asyncio.run(follow.tell_next(self.to, "mlflow"))

    def cursor(self) -> JobFollower:
        with self.to.sessions.begin() as session:
            return session.scalars(select(JobFollower).where(JobFollower.job_id == self.id)).one()

    def events(self) -> list[JobEvent]:
        with self.to.sessions.begin() as session:
            mine = select(JobEvent).where(JobEvent.job_id == self.id, JobEvent.type == "message")
            return list(session.scalars(mine.order_by(JobEvent.sequence)))

    def ask(self, path: str, **asked: Any) -> Any:
        url = f"{self.to.settings.mlflow.tracking_uri}/api/2.0/mlflow/{path}"
        return (
            httpx.request("POST" if path == "runs/search" else "GET", url, **asked, timeout=PATIENCE_SECONDS)
            .raise_for_status()
            .json()
        )

    def runs(self) -> list[Any]:
        found = self.ask("experiments/get-by-name", params={"experiment_name": self.experiment})
        wanted = {"experiment_ids": [found["experiment"]["experiment_id"]]}
        return list(self.ask("runs/search", json=wanted).get("runs", ()))

    def history(self, metric: str) -> list[tuple[int, float]]:
        (run,) = self.runs()
        asked = {"run_id": run["info"]["run_id"], "metric_key": metric}
        return [(point["step"], point["value"]) for point in self.ask("metrics/get-history", params=asked)["metrics"]]


@pytest.fixture
def followed(to: Services, organization: Caller) -> Followed:
    experiment = f"mine of {organization.organization_slug}"
    asked = {"experiment": experiment, "run_name": "first", "tags": {"team": "a"}}
    with to.sessions.begin() as session:
        job = make.queued_job(session, organization, integrations=[{"type": "mlflow", "mlflow": asked}])
    return Followed(to, job.id, experiment)


def stepped(step: int, loss: float | None = None) -> events.Stepped:
    return events.Stepped(
        step=step,
        total_steps=9,
        train_loss=1 / step if loss is None else loss,
        train_mean_token_accuracy=0.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=10,
        labelled_tokens=5,
        tokens_left=10,
        tokens_per_second=100.0,
    )


def evaluated(step: int) -> events.Evaluated:
    return events.Evaluated(step=step, valid_loss=2.0 + step, valid_mean_token_accuracy=0.25)


def test_a_run_holds_each_step_once_with_configuration_and_ending(followed: Followed) -> None:
    followed.look()
    assert followed.cursor().run is None  # nothing has been measured: there is nothing to begin a run for
    lease = followed.claim()
    followed.train(lease, stepped(1), stepped(2), evaluated(2), stepped(3))
    followed.look()
    assert followed.history("train_loss") == [(1, 1.0), (2, 0.5)]  # of the third more may yet be said

    followed.train(lease, evaluated(3))
    with followed.to.sessions.begin() as session:  # its worker dies, and another repeats two steps; the last time it says else
        make.expire_lease(session, session.get_one(Job, followed.id))
        leases.reap(session, settings=make.LEASES)
    lease = followed.claim()
    followed.train(lease, stepped(2, 7.0), evaluated(2), stepped(3, 7.0), evaluated(3), stepped(4))
    followed.look()
    followed.look()
    with followed.to.sessions.begin() as session:
        make.complete(session, lease)
    followed.look()
    followed.look()

    (run,) = followed.runs()
    assert followed.history("train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert followed.history("valid_loss") == [(2, 4.0), (3, 5.0)]
    assert {metric["key"] for metric in run["data"]["metrics"]} >= {"learning_rate", "tokens_per_second", "grad_norm"}
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert (params["base_model"], params["spec.lora.rank"], params["plan.examples"]) == (make.TINY, "16", "12")
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert (tags["team"], tags["tunesmith.job_id"], tags["tunesmith.status"]) == ("a", followed.id, "succeeded")
    assert tags["tunesmith.fine_tuned_model"].startswith(f"ft:{make.TINY}:")
    assert (run["info"]["run_name"], run["info"]["status"]) == ("first", "FINISHED")
    assert followed.cursor().next_attempt_at is None
    (said,) = [event for event in followed.events() if event.message.startswith("Reporting to MLflow")]
    assert said.data is not None and said.data["run_id"] == run["info"]["run_id"]
    assert said.data["url"].startswith("https://mlflow.example/#/experiments/")


def test_a_follower_killed_before_it_could_note_what_it_has_told_leaves_no_gap_and_no_double(followed: Followed) -> None:
    lease = followed.claim()
    followed.train(lease, stepped(1), stepped(2), evaluated(2), stepped(3))
    settings = followed.to.settings
    with followed.to.sessions.begin() as session:
        held = select(Job).where(Job.id == followed.id).with_for_update()  # whoever has told the tracker waits for this row
        session.scalars(held).one()
        killed = subprocess.Popen(
            (sys.executable, "-c", TELL_ONE), env=environment.of(settings, secrets=("DATABASE__SYSTEM_URL", "MLFLOW"))
        )
        eventually(lambda: _is_told(followed))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert followed.cursor().step == -1 and followed.cursor().run is None
    followed.train(lease, stepped(4))

    followed.look()
    assert followed.history("train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert followed.history("valid_loss") == [(2, 4.0)]
    assert followed.cursor().step == 3


def _is_told(followed: Followed) -> bool:
    try:
        return len(followed.history("valid_loss")) == 1
    except (httpx.HTTPError, KeyError, ValueError):
        return False  # there is no experiment yet, or no run


def test_whoever_comes_late_moves_no_cursor(followed: Followed) -> None:
    lease = followed.claim()
    followed.train(lease, stepped(1), stepped(2), stepped(3))
    with followed.to.sessions.begin() as session:
        late = tracking.claim(session, "mlflow")
    assert late is not None
    followed.look()
    with followed.to.sessions.begin() as session:
        tracking.told(session, late, tracking.Run("another", None), again_in=timedelta())
        tracking.failed(session, late, reason="it was late")

    assert (followed.cursor().step, followed.cursor().failures) == (2, 0)
    assert followed.cursor().run != {"id": "another", "url": None}


def test_a_job_whose_tracker_is_away_succeeds_and_says_what_was_not_told(followed: Followed) -> None:
    lease = followed.claim()
    followed.train(lease, stepped(1), stepped(2), stepped(3))
    followed.look()
    away = Followed(_with(followed.to, tracking_uri=NOWHERE), followed.id, followed.experiment)
    with followed.to.sessions.begin() as session:
        make.complete(session, lease)
        assert session.get_one(Job, followed.id).state == "succeeded"
    for attempt, _ in enumerate(tracking.RETRY_DELAYS, 1):
        away.look()
        assert away.cursor().failures == attempt and away.cursor().next_attempt_at is not None
    assert not [event for event in away.events() if event.level == "warn"]
    away.look()

    (said,) = [event for event in away.events() if event.level == "warn"]
    assert said.message.startswith("MLflow has not been told what came after step 2: it does not answer.")
    assert NOWHERE not in said.message and said.data is not None and said.data["last_step"] == 2
    assert away.cursor().next_attempt_at is None


def test_a_tracker_that_comes_back_is_told_what_it_missed(followed: Followed) -> None:
    lease = followed.claim()
    followed.train(lease, *(stepped(step) for step in range(1, 6)))
    away = Followed(_with(followed.to, tracking_uri=NOWHERE), followed.id, followed.experiment)
    away.look()
    assert away.cursor().failures == 1
    followed.look()

    assert [step for step, _ in followed.history("train_loss")] == [1, 2, 3, 4] and followed.cursor().failures == 0


def test_what_is_read_in_parts_is_whole_and_in_order(followed: Followed) -> None:
    followed.train(followed.claim(), *(stepped(step) for step in range(1, 9)))
    told, has_more = [-1], True
    with followed.to.sessions.begin() as session:
        while has_more:
            points, has_more = tracking.read(session, followed.id, after=told[-1], is_over=True, limit=3)
            told += [point.step for point in points]

    assert told[1:] == list(range(1, 9))


def test_the_job_shows_what_the_sdk_knows_and_beside_it_all_that_was_asked(
    client: OpenAI, file_id: str, system_sessions: orm.sessionmaker[orm.Session]
) -> None:
    job = client.fine_tuning.jobs.create(model=make.TINY, training_file=file_id)
    asked = [{"type": "mlflow", "mlflow": {"experiment": "e"}}, {"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}]
    with system_sessions.begin() as session:
        session.get_one(Job, job.id).integrations = asked
    shown = client.fine_tuning.jobs.retrieve(job.id)

    assert [one.wandb.project for one in shown.integrations or ()] == ["p"]
    assert shown.model_extra is not None and shown.model_extra["trackers"] == asked
    assert type(shown).model_validate(shown.model_dump()).id == job.id  # the SDK's own type, without its lenience


@pytest.mark.parametrize(
    ("integration", "setting"),
    [
        ({"type": "wandb", "wandb": {"project": "p"}}, "TUNESMITH_WANDB__API_KEY"),
        ({"type": "mlflow", "mlflow": {"experiment": "e"}}, "TUNESMITH_MLFLOW__TRACKING_URI"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_not_configured_is_refused_with_the_setting(
    client: OpenAI, file_id: str, integration: dict[str, Any], setting: str, dry_run: bool
) -> None:
    body = {"model": make.TINY, "training_file": file_id, "integrations": [integration], "dry_run": dry_run}
    answer = httpx.post(
        f"{client.base_url}fine_tuning/jobs",
        json=body,
        headers={"Authorization": f"Bearer {client.api_key}"},
        timeout=PATIENCE_SECONDS,
    )

    error = make.require_envelope(answer.status_code, answer.json())
    assert (answer.status_code, error["code"], error["param"]) == (400, "integration_not_configured", "integrations.0.type")
    assert setting in str(error["message"])


def _with(to: Services, **mlflow: str) -> Services:
    changed = to.settings.model_copy(update={"mlflow": MlflowSettings(**mlflow)})
    return Services(changed, to.sessions, to.storage, to.catalog)
