"""A real engine over real sockets, whose model says what a test tells it to; and a worker's services."""

from collections.abc import Iterator

import pytest
from sqlalchemy import delete, orm, update

from app.accounts.caller import Caller
from app.core.settings import Settings
from app.core.storage import Storage
from app.models import Engine as EngineRow
from app.models import Evaluation, EvaluationState
from app.models.evaluations import UNDECIDED
from tests import make as rows
from tests.evaluations.make import ScriptedRunner
from tests.inference import served
from worker.services import Services, open_services


@pytest.fixture(scope="session")
def services(settings: Settings) -> Iterator[Services]:
    opened = open_services(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()


@pytest.fixture(scope="session")
def engine(settings: Settings, storage: Storage) -> Iterator[tuple[str, ScriptedRunner]]:
    """Its address, and the model in it."""
    renderer = served.renderer(settings, storage)
    runner = ScriptedRunner(renderer.tokenizer, min(renderer.stop_ids))
    with served.served(runner, renderer, settings, max_batch=8, max_waiting=64) as (url, _):
        yield url, runner


@pytest.fixture
def model(engine: tuple[str, ScriptedRunner], system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[ScriptedRunner]:
    """The engine's model, while the engine is known to live. Evaluations of other tests are over."""
    url, runner = engine
    runner.asked.clear()
    with system_sessions.begin() as session:
        over = update(Evaluation).where(Evaluation.state.in_(UNDECIDED))
        session.execute(over.values(state=EvaluationState.CANCELLED, lease_owner=None, lease_expires_at=None))
    served.make_known(system_sessions, url, engine_id="scripted")
    yield runner
    with system_sessions.begin() as session:
        session.execute(delete(EngineRow).where(EngineRow.id == "scripted"))


@pytest.fixture
def tuned(system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> str:
    """The name of a model that the organization has made."""
    with system_sessions.begin() as session:
        return rows.tuned_model(session, organization)
