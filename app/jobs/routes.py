import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse

from app import pages
from app.deps import BaseModels, Caller, IsRetry, OpenSession, Prices, Session, Settings
from app.idempotency import IdempotentRoute
from app.jobs import comparing, integrations, queue
from app.jobs import service as jobs
from app.jobs.comparing import ComparisonOut
from app.jobs.dry_run import DryRunner, DryRunOut
from app.jobs.feed import Feed
from app.jobs.schemas import MAX_LISTED, CheckpointOut, EventOut, JobCreate, JobOut, QueueOut
from app.models import Job

router = APIRouter(prefix="/v1/fine_tuning", tags=["Fine-tuning"], route_class=IdempotentRoute)
queues = APIRouter(prefix="/v1", tags=["Fine-tuning"], route_class=IdempotentRoute)


UNCACHED = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second: nginx passes each event on as it comes
_EVENT_STREAM: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def get_dry_runner(request: Request) -> DryRunner:
    dry_runner: DryRunner = request.app.state.dry_runner
    return dry_runner


def get_feed(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


EventFeed = Annotated[Feed, Depends(get_feed)]
DryRuns = Annotated[DryRunner, Depends(get_dry_runner)]


@router.post("/jobs")
def create_job(
    body: JobCreate,
    open_session: OpenSession,
    caller: Caller,
    catalog: BaseModels,
    settings: Settings,
    dry_runner: DryRuns,
    is_retry: IsRetry,
) -> JobOut | DryRunOut:
    """Queue a fine-tuning job; with `dry_run`, tell what would come of it, and queue nothing."""
    integrations.require_offered(body.integrations, settings)
    if body.dry_run:  # takes seconds: no transaction may be open meanwhile
        return dry_runner.run(caller, body)
    training = settings.training
    session = open_session()
    job = jobs.create(
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
    return _shown(session, job)


@router.get("/jobs")
def list_jobs(
    request: Request, session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 20
) -> pages.Page[JobOut]:
    """Your jobs, newest first; `metadata[key]=value` keeps those that carry it."""
    metadata = {
        found[1]: value for key, value in request.query_params.items() if (found := re.fullmatch(r"metadata\[(.+)\]", key))
    }
    mine, has_more = jobs.list_page(session, caller, metadata=metadata, after=after, limit=limit)
    places = queue.places(session, mine)
    return pages.page((mine, has_more), lambda job: JobOut.of(job, places.get(job.id), is_listed=True))


@router.get("/jobs/compare")
def compare_jobs(
    session: Session,
    caller: Caller,
    prices: Prices,
    ids: Annotated[list[str], Query(min_length=1)],
    points: Annotated[int, Query(ge=2, le=2000)] = 200,
) -> ComparisonOut:
    """2 to 20 jobs side by side, as `ids=a,b` or `ids=a&ids=b`; at most `points` of each curve."""
    return comparing.compare(session, caller, ids, points=points, prices=prices)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, session: Session, caller: Caller) -> JobOut:
    """One job."""
    return _shown(session, jobs.get(session, caller, job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: str, session: Session, caller: Caller) -> JobOut:
    """Stop a job. A running one ends at its next heartbeat."""
    return _shown(session, jobs.cancel(session, caller, job_id))


@router.post("/jobs/{job_id}/pause")
def pause_job(job_id: str, session: Session, caller: Caller) -> JobOut:
    """Halt a job. A running one keeps a checkpoint first; it shows as `queued` with `paused: true`."""
    return _shown(session, jobs.pause(session, caller, job_id))


@router.post("/jobs/{job_id}/resume")
def resume_job(job_id: str, session: Session, caller: Caller) -> JobOut:
    """Let a paused job go on from its last checkpoint."""
    return _shown(session, jobs.resume(session, caller, job_id))


@router.post("/jobs/{job_id}/publish")
def publish_job(job_id: str, session: Session, caller: Caller) -> JobOut:
    """Make a model live that did not pass its quality gate. The job stays failed."""
    return _shown(session, jobs.publish(session, caller, job_id))


@router.get("/jobs/{job_id}/events", response_model=pages.Page[EventOut], responses=_EVENT_STREAM)
def list_job_events(
    job_id: str,
    session: Session,
    caller: Caller,
    feed: EventFeed,
    after: str | None = None,
    limit: pages.Limit = 20,
    stream: bool = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> pages.Page[EventOut] | StreamingResponse:
    """What happened to a job, newest first; metrics of each step among it.

    With `stream`, server-sent events, the oldest first, until the job is over; `Last-Event-ID` goes on behind that event.
    """
    if stream:
        known = jobs.sequence_of(session, caller, job_id, last_event_id or after)
        return StreamingResponse(feed.follow(caller, job_id, after=known), media_type="text/event-stream", headers=UNCACHED)
    return pages.page(jobs.list_events(session, caller, job_id, after=after, limit=limit), EventOut.of)


@router.get("/jobs/{job_id}/checkpoints")
def list_job_checkpoints(
    job_id: str, session: Session, caller: Caller, after: str | None = None, limit: pages.Limit = 10
) -> pages.Page[CheckpointOut]:
    """Checkpoints of a job, newest first. Each answers chats by its name."""
    return pages.page(jobs.list_checkpoints(session, caller, job_id, after=after, limit=limit), CheckpointOut.of)


@queues.get("/queue")
def list_queues(session: Session, caller: Caller, settings: Settings) -> pages.Page[QueueOut]:
    """How many jobs wait for workers and run, tier by tier, and where yours stand."""
    found = queue.list_queues(session, caller, among=settings.training.tiers, most=MAX_LISTED + 1)
    return pages.page((found, False), QueueOut.of)


def _shown(session: Session, job: Job) -> JobOut:
    return JobOut.of(job, queue.places(session, [job]).get(job.id))
