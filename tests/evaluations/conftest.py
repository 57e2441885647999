"""A real engine over real sockets, whose model says what a test tells it to; and a worker's services."""

import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from sqlalchemy import delete, orm, update

from app.accounts.caller import Caller
from app.core import catalog
from app.core.engine import AdapterRef, Heartbeat
from app.core.manifest import BaseEntry
from app.core.render import Renderer
from app.core.settings import Settings
from app.core.storage import Storage
from app.inference import engines
from app.models import Engine as EngineRow
from app.models import Evaluation, EvaluationState
from app.models.evaluations import UNDECIDED
from tests import make as rows
from tests.evaluations.make import ScriptedRunner
from tests.inference.make import Words
from worker.inference.adapters import AdapterStore, Room
from worker.inference.driver import Caps
from worker.inference.engine import Engine
from worker.inference.native import NativeDriver
from worker.inference.pages import Pages
from worker.inference.routes import create_app
from worker.inference.scheduler import Scheduler
from worker.model import card
from worker.services import Services, open_services


@pytest.fixture(scope="session")
def services(settings: Settings) -> Iterator[Services]:
    opened = open_services(settings)
    yield opened
    opened.sessions.kw["bind"].dispose()


@pytest.fixture(scope="session")
def engine(settings: Settings, storage: Storage) -> Iterator[tuple[str, ScriptedRunner]]:
    """Its address, and the model in it."""
    base = catalog.load()[rows.TINY]
    folder = card.prepared(base, settings.cache_dir)
    card.publish(storage, base.id, folder)
    renderer = Renderer.open(folder)

    def load(ref: AdapterRef) -> Words:
        return Words(ref.id)

    runner = ScriptedRunner(renderer.tokenizer, min(renderer.stop_ids))
    entry = BaseEntry(id=base.id, revision="1", digest="0" * 64)
    caps = Caps(entry, "nf4", renderer.context_length, base.architecture.vocab, 8, 4, 16)
    pages = Pages(count=4096, size=16)
    limits = {"max_batch": 8, "max_waiting": 64, "max_waiting_of_tenant": 64, "step_tokens": 4096}
    scheduled = Engine(runner, Scheduler(pages, **limits))
    driver = NativeDriver(scheduled, AdapterStore(load, base=entry, room=Room(4, 99, 99)), renderer, caps)
    port = rows.free_port()
    app = create_app(driver, token=settings.engine_token.get_secret_value())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", runner
    server.should_exit = True
    thread.join()
    driver.close()


@pytest.fixture
def model(engine: tuple[str, ScriptedRunner], system_sessions: orm.sessionmaker[orm.Session]) -> Iterator[ScriptedRunner]:
    """The engine's model, while the engine is known to live. Evaluations of other tests are over."""
    url, runner = engine
    runner.asked.clear()
    with system_sessions.begin() as session:
        over = update(Evaluation).where(Evaluation.state.in_(UNDECIDED))
        session.execute(over.values(state=EvaluationState.CANCELLED, lease_owner=None, lease_expires_at=None))
        beat = Heartbeat(engine_id="scripted", url=url, base=rows.TINY, base_digest="0" * 64, running=0, waiting=0)
        engines.record(session, beat)
    yield runner
    with system_sessions.begin() as session:
        session.execute(delete(EngineRow).where(EngineRow.id == "scripted"))


@pytest.fixture
def tuned(system_sessions: orm.sessionmaker[orm.Session], organization: Caller) -> str:
    """The name of a model that the organization has made."""
    with system_sessions.begin() as session:
        return rows.tuned_model(session, organization)
