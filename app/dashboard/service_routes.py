"""How the installation stands, for its operators: workers, queues, engines and what they hold."""

from collections import Counter

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse

from app import processes, standing
from app.core.errors import NotFound
from app.dashboard.deps import SignedIn, get_visitor
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Session

router = APIRouter(include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

LATE_SECONDS = 3 * processes.BEAT_SECONDS  # a relay looks at each of its beats


@router.get("/service")
def show_service(request: Request, session: Session, visitor: SignedIn) -> HTMLResponse:
    """As the relay saw it last. For others there is no such page."""
    if not visitor.is_operator:
        raise NotFound("there is no such page")
    seen, age_seconds = standing.kept(session) or (None, 0.0)
    is_late = seen is None or age_seconds > LATE_SECONDS
    told = seen.told if seen else {"processes": ()}
    workers = Counter(queue for process in told["processes"] for queue in process["queues"])
    return render(request, "service.html", seen=seen, is_late=is_late, told=told, workers=workers)
