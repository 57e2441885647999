from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text

from app.deps import Settings, Storage
from app.inference import engines

router = APIRouter(tags=["Health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """This process runs."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(request: Request, settings: Settings, storage: Storage) -> JSONResponse:
    """Whether requests can be answered: database, storage, and at least one engine that holds a base."""
    with request.app.state.sessions.begin() as session:
        session.execute(text("SELECT 1"))
        live = engines.list_live(session, timeout_seconds=settings.inference.heartbeat_timeout_seconds)
    storage.check()
    checks = {"database": "ok", "storage": "ok", "engines": len(live), "bases": sorted({engine.base for engine in live})}
    return JSONResponse({"status": "ok" if live else "waiting for an engine", **checks}, status_code=200 if live else 503)
