"""The API process: `uvicorn app.main:create_app --factory`."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI

from app import db, handlers, health, manual, metrics
from app.accounts.browser import Browser
from app.accounts.keys import KeyRing
from app.accounts.middleware import Authenticate
from app.accounts.users import SignIns
from app.adapters import alias_routes as aliases
from app.adapters import routes as adapters
from app.core import catalog, judges, logging, prices, storage, tracing
from app.core.settings import Settings
from app.dashboard import registration as dashboard
from app.evaluations import routes as evaluations
from app.evaluations.asking import Asker
from app.files import routes as files
from app.files import upload_routes as uploads
from app.files.assembly import Assembler
from app.http import BodyLimit, RequestContext, Traced
from app.inference import routes as inference
from app.inference.gateway import Gateway
from app.inference.renderers import Renderers
from app.jobs import routes as jobs
from app.jobs.dry_run import DryRunner
from app.jobs.feed import Feed
from app.sweeps import routes as sweeps
from app.webhooks import routes as webhooks
from app.webhooks import sending
from app.webhooks.samples import Sampler


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API with all its rooms. Starts whether or not the services behind it are up."""
    settings = settings or Settings()
    key_pepper, engine_token = (secret.get_secret_value() for secret in (settings.key_pepper, settings.engine_token))
    if not key_pepper or not engine_token:
        raise ValueError("set TUNESMITH_KEY_PEPPER and TUNESMITH_ENGINE_TOKEN: an empty secret is everybody's")
    logging.configure("api", format=settings.log_format, level=settings.log_level)
    tracing.configure("api", settings.tracing)
    app = FastAPI(
        title="Tunesmith", version=version("tunesmith"), lifespan=_lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    state = app.state
    state.settings = settings
    state.sessions = db.open_sessions(
        settings.database.api_url, pool_size=settings.database.pool_size, statement_seconds=db.REQUEST_TIMEOUT_SECONDS
    )
    state.turns = CapacityLimiter(settings.database.pool_size)
    state.storage = storage.open_storage(settings.storage, for_requests=True)
    state.assembler = Assembler(state.sessions, storage.open_storage(settings.storage))
    state.catalog = catalog.load(settings.catalog_file)
    state.prices = prices.load(settings.price_file)
    state.dry_runner = DryRunner(state.sessions, state.storage, state.catalog, settings)
    state.feed = Feed(state.sessions, settings.database.api_url)
    state.metrics = metrics.ApiMetrics()
    state.gateway = Gateway(
        state.sessions,
        state.catalog,
        Renderers(state.storage),
        settings.inference,
        settings.engine_token,
        metrics=state.metrics.gateway,
    )
    state.browser = Browser(SignIns(state.sessions, key_pepper.encode()), settings.dashboard.url)
    state.asker = Asker(state.gateway, judges.load(settings.evaluations.judges_file))
    for router in (
        files.router,
        uploads.router,
        jobs.router,
        jobs.queues,
        sweeps.router,
        evaluations.router,
        adapters.router,
        aliases.router,
        inference.router,
        webhooks.router,
        inference.internal,
        health.router,
        metrics.router,
    ):
        app.include_router(router)
    manual.register(app)
    handlers.register(app)
    if settings.dashboard.is_served:
        dashboard.register(app)
    # the last one added is the outermost: measured as a whole, an id first, a span, then who asks, then how much they send
    app.add_middleware(BodyLimit, limits=settings.limits)
    app.add_middleware(
        Authenticate, keys=KeyRing(state.sessions, key_pepper.encode()), browser=state.browser, engine_token=engine_token
    )
    app.add_middleware(Traced)
    app.add_middleware(RequestContext)
    app.add_middleware(metrics.Measured, metrics=state.metrics.http)
    return app


def _close_on_signal(feed: Feed) -> None:
    """The server waits for open answers before it lets the lifespan end, and a job's events last as long as the job."""
    if threading.current_thread() is not threading.main_thread():  # nobody sends signals to a server within a test
        return
    loop = asyncio.get_running_loop()

    def close_first(then: Any, number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(feed.close)
        if callable(then):
            then(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(close_first, signal.getsignal(number)))


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in (health.watch(app), app.state.feed.run())]
    _close_on_signal(app.state.feed)
    state = app.state
    async with sending.open_client(state.settings.webhooks) as client:
        state.sampler = Sampler(state.sessions, client, state.settings.webhooks)
        yield
    for task in tasks:
        task.cancel()
    await app.state.asker.close()
    await app.state.gateway.close()
    app.state.sessions.kw["bind"].dispose()
    await asyncio.to_thread(tracing.close)  # the server raises the signal that ended it once more, and nothing runs after that
