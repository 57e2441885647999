"""A real engine over real sockets, in a thread, around a runner that says what a test wants."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import uvicorn
from sqlalchemy import func, orm, update

from app.core import catalog
from app.core.engine import AdapterRef, Heartbeat
from app.core.manifest import BaseEntry
from app.core.render import Renderer
from app.core.settings import Settings
from app.core.storage import Storage
from app.inference import engines
from app.models import Engine as EngineRow
from tests import make as rows
from tests.inference import make
from tests.inference.make import Words
from worker.inference.adapters import AdapterStore, Room
from worker.inference.driver import Caps
from worker.inference.engine import Engine, Runner
from worker.inference.native import NativeDriver
from worker.inference.pages import Pages
from worker.inference.routes import create_app
from worker.model import card

DIGEST = "0" * 64


def renderer(settings: Settings, storage: Storage) -> Renderer:
    """Of the tiny base, whose card is in storage from now on."""
    folder = card.prepared(catalog.load()[rows.TINY], settings.cache_dir)
    card.publish(storage, rows.TINY, folder)
    return Renderer.open(folder)


def make_known(sessions: orm.sessionmaker[orm.Session], url: str, *, engine_id: str | None = None) -> None:
    """To the gateway, for as long as a test may take: nobody beats for it."""
    beat = Heartbeat(engine_id=engine_id or url, url=url, base=rows.TINY, base_digest=DIGEST, running=0, waiting=0)
    with sessions.begin() as session:
        engines.record(session, beat)
        lasts = func.clock_timestamp() + timedelta(hours=1)
        session.execute(update(EngineRow).where(EngineRow.id == beat.engine_id).values(heartbeat_at=lasts))


@contextmanager
def served(runner: Runner, of: Renderer, settings: Settings, **limits: int) -> Iterator[tuple[str, NativeDriver]]:
    """Its address, and its driver. It has any adapter that it is asked for."""

    def load(ref: AdapterRef) -> Words:
        return Words(ref.id)

    entry, vocabulary = BaseEntry(id=rows.TINY, revision="1", digest=DIGEST), catalog.load()[rows.TINY].architecture.vocab
    scheduler = make.scheduler(pages=Pages(count=4096, size=16), **{"step_tokens": 4096, **limits})
    caps = Caps(entry, "nf4", of.context_length, vocabulary, 8, 4, 16)
    driver = NativeDriver(Engine(runner, scheduler), AdapterStore(load, base=entry, room=Room(4, 99, 99)), of, caps)
    app, port = create_app(driver, token=settings.engine_token.get_secret_value()), rows.free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", driver
    finally:
        server.should_exit = True
        thread.join()
        driver.close()
