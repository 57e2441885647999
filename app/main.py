"""The API process: `uvicorn app.main:create_app --factory`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from app import db, handlers, health, manual
from app.accounts.keys import KeyRing
from app.accounts.middleware import Authenticate
from app.adapters import routes as adapters
from app.core import catalog, judges, logging, prices, storage
from app.core.settings import Settings
from app.evaluations import routes as evaluations
from app.evaluations.asking import Asker
from app.files import routes as files
from app.http import BodyLimit, RequestContext
from app.inference import routes as inference
from app.inference.gateway import Gateway
from app.inference.renderers import Renderers
from app.jobs import routes as jobs
from app.jobs.dry_run import DryRunner
from app.sweeps import routes as sweeps
from app.webhooks import routes as webhooks


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API with all its rooms. Starts whether or not the services behind it are up."""
    settings = settings or Settings()
    key_pepper, engine_token = (secret.get_secret_value() for secret in (settings.key_pepper, settings.engine_token))
    if not key_pepper or not engine_token:
        raise ValueError("set TUNESMITH_KEY_PEPPER and TUNESMITH_ENGINE_TOKEN: an empty secret is everybody's")
    logging.configure("api", format=settings.log_format, level=settings.log_level)
    app = FastAPI(
        title="Tunesmith", version=version("tunesmith"), lifespan=_lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    state = app.state
    state.settings = settings
    state.sessions = db.open_sessions(
        settings.database.api_url, pool_size=settings.database.pool_size, statement_seconds=db.REQUEST_TIMEOUT_SECONDS
    )
    state.storage = storage.open_storage(settings.storage, for_requests=True)
    state.catalog = catalog.load(settings.catalog_file)
    state.prices = prices.load(settings.price_file)
    state.dry_runner = DryRunner(state.sessions, state.storage, state.catalog, settings)
    state.gateway = Gateway(state.sessions, state.catalog, Renderers(state.storage), settings.inference, settings.engine_token)
    state.asker = Asker(state.gateway, judges.load(settings.evaluations.judges_file))
    for router in (
        files.router,
        jobs.router,
        jobs.queues,
        sweeps.router,
        evaluations.router,
        adapters.router,
        inference.router,
        webhooks.router,
        inference.internal,
        health.router,
    ):
        app.include_router(router)
    manual.register(app)
    handlers.register(app)
    # the last one added is the outermost: an id first, then who asks, then how much they send
    limits = settings.limits
    app.add_middleware(BodyLimit, body_bytes=limits.body_bytes, file_bytes=limits.file_bytes)
    app.add_middleware(Authenticate, keys=KeyRing(state.sessions, key_pepper.encode()), engine_token=engine_token)
    app.add_middleware(RequestContext)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    watching = asyncio.create_task(health.watch(app))
    yield
    watching.cancel()
    await app.state.asker.close()
    await app.state.gateway.close()
    app.state.sessions.kw["bind"].dispose()
