import asyncio
from collections.abc import Callable
from functools import partial

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import orm, text
from starlette.concurrency import run_in_threadpool

from app import db
from app.core.errors import Unavailable
from app.deps import Settings, Storage
from app.inference import engines
from app.models import Engine

log = structlog.get_logger()

SAY_AGAIN_SECONDS = 15.0

router = APIRouter(tags=["Health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """This process runs."""
    return {"status": "ok"}  # without a thread: those may all be waiting for a database that hangs


@router.get("/readyz")
def readyz(request: Request, settings: Settings, storage: Storage) -> JSONResponse:
    """Whether requests can be answered: database, storage, and at least one engine that holds a base."""
    live: list[Engine] = []
    expected: list[Engine] = []

    def ask_database() -> None:
        with request.app.state.sessions.begin() as session:
            live.extend(engines.list_live(session, timeout_seconds=settings.inference.heartbeat_timeout_seconds))
            expected.extend(engines.list_expected(session))

    _require({"database": ask_database, "storage": storage.check})
    checks = {
        "database": "ok",
        "storage": "ok",
        "engines": len(live),
        "bases": sorted({engine.base for engine in live}),
        "bases_away": sorted({engine.base for engine in expected} - {engine.base for engine in live}),
        "quantizations": sorted({engine.quantization for engine in live}),
    }
    return JSONResponse({"status": "ok" if live else "waiting for an engine", **checks}, status_code=200 if live else 503)


async def watch(app: FastAPI) -> None:
    """Say at a calm pace what is waited for, until database and storage have answered. Requests get 503 meanwhile."""
    checks = {"database": partial(_ask_database, app.state.sessions), "storage": app.state.storage.check}
    while True:
        try:
            await run_in_threadpool(_require, checks)
        except Unavailable:  # said already
            await asyncio.sleep(SAY_AGAIN_SECONDS)
        else:
            log.info("database_and_storage_answer")
            return


def _ask_database(sessions: orm.sessionmaker[orm.Session]) -> None:
    with sessions.begin() as session:
        session.execute(text("SELECT 1"))


def _require(checks: dict[str, Callable[[], None]]) -> None:
    """Raises Unavailable with the names of all that do not answer, and why."""
    missing: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            if not isinstance(error, Unavailable) and not db.is_outage(error):
                raise
            log.warning("not_ready", missing=name, error=type(error).__name__)
            missing[name] = f"{name}: {error}" if isinstance(error, Unavailable) else f"{name}: it does not answer"
    if missing:
        raise Unavailable("not ready; " + "; ".join(missing.values()), code=f"{next(iter(missing))}_unavailable")
