from fastapi import APIRouter

from app import pages
from app.deps import BaseModels, Caller, IsRetry, Session, Settings
from app.idempotency import IdempotentRoute
from app.jobs import integrations
from app.models import Sweep
from app.sweeps import service as sweeps
from app.sweeps.schemas import SweepCreate, SweepOut

router = APIRouter(prefix="/v1/fine_tuning", tags=["Fine-tuning"], route_class=IdempotentRoute)


@router.post("/sweeps")
def create_sweep(
    body: SweepCreate,
    session: Session,
    caller: Caller,
    catalog: BaseModels,
    settings: Settings,
    is_retry: IsRetry,
) -> SweepOut:
    """Queue a job for each combination of a grid, or for some of them: all or none."""
    integrations.require_offered(body.integrations, settings)
    training = settings.training
    made = sweeps.create(
        session,
        caller,
        catalog,
        request=body,
        tiers=training.tiers,
        gpu=settings.gpu,
        limits=settings.evaluations,
        quantizations=training.quantizations,
        is_retry=is_retry,
    )
    return _shown(session, caller, made)


@router.get("/sweeps")
def list_sweeps(session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20) -> pages.Page[SweepOut]:
    """Your sweeps, newest first."""
    mine, has_more = sweeps.list_page(session, caller, after=after, limit=limit)
    shown = sweeps.shown(session, caller, mine)
    return pages.page((mine, has_more), lambda sweep: shown[sweep.id])


@router.get("/sweeps/{sweep_id}")
def get_sweep(sweep_id: str, session: Session, caller: Caller) -> SweepOut:
    """One sweep, its jobs, and the best of them so far."""
    return _shown(session, caller, sweeps.get(session, caller, sweep_id))


@router.post("/sweeps/{sweep_id}/cancel")
def cancel_sweep(sweep_id: str, session: Session, caller: Caller) -> SweepOut:
    """Cancel those of its jobs that have not ended."""
    return _shown(session, caller, sweeps.cancel(session, caller, sweep_id))


def _shown(session: Session, caller: Caller, sweep: Sweep) -> SweepOut:
    return sweeps.shown(session, caller, [sweep])[sweep.id]
