import json
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from sqlalchemy import orm

from app.accounts.caller import Caller as ApiCaller
from app.core.settings import Settings as AllSettings
from app.dashboard.deps import get_visitor
from app.dashboard.keys_routes import Made
from app.dashboard.rendering import render
from app.dashboard.route import PageRoute
from app.deps import Caller, Session, Settings
from app.handlers import first_problem
from app.webhooks import delivery_log
from app.webhooks import service as webhooks
from app.webhooks.emit import EventType
from app.webhooks.routes import Samples
from app.webhooks.schemas import DeliveryDetail, DeliveryOut, EndpointCreate, EndpointUpdate, SecretRotation

router = APIRouter(prefix="/webhooks", include_in_schema=False, route_class=PageRoute, dependencies=[Depends(get_visitor)])

MOST = 100


@router.get("")
def list_endpoints(request: Request, session: Session, caller: Caller) -> HTMLResponse:
    return _listed(request, session, caller)


@router.post("")
def create_endpoint(
    request: Request,
    session: Session,
    caller: Caller,
    settings: Settings,
    url: Annotated[str, Form()],
    name: Annotated[str, Form()] = "",
    event_types: Annotated[list[str], Form()] = [],  # noqa: B006 - FastAPI copies it
) -> HTMLResponse:
    try:
        asked = EndpointCreate.model_validate({"url": url, "name": name, "event_types": event_types})
    except ValidationError as error:
        raise first_problem(error.errors()) from None
    made = webhooks.create(session, caller, request=asked, settings=settings.webhooks)
    return _listed(request, session, caller, made=Made(made.name, made.secret))


@router.delete("/{endpoint_id}")
def delete_endpoint(request: Request, session: Session, caller: Caller, endpoint_id: str) -> HTMLResponse:
    webhooks.delete(session, caller, endpoint_id)
    session.flush()
    return _listed(request, session, caller)


@router.get("/{endpoint_id}")
def show_endpoint(request: Request, session: Session, caller: Caller, endpoint_id: str) -> HTMLResponse:
    return _shown(request, session, caller, endpoint_id)


@router.post("/{endpoint_id}/enable")
def enable_endpoint(request: Request, session: Session, caller: Caller, settings: Settings, endpoint_id: str) -> HTMLResponse:
    return _switched(request, session, caller, settings, endpoint_id, is_enabled=True)


@router.post("/{endpoint_id}/disable")
def disable_endpoint(request: Request, session: Session, caller: Caller, settings: Settings, endpoint_id: str) -> HTMLResponse:
    return _switched(request, session, caller, settings, endpoint_id, is_enabled=False)


@router.post("/{endpoint_id}/rotate")
def rotate_secret(request: Request, session: Session, caller: Caller, endpoint_id: str) -> HTMLResponse:
    asked = SecretRotation(keep_old_secret_active_for_24_hours=True)
    endpoint = webhooks.rotate_secret(session, caller, endpoint_id, request=asked)
    return render(request, "secret.html", made=Made("New signing secret", endpoint.secret))


@router.post("/{endpoint_id}/test")
async def send_sample(
    request: Request, caller: Caller, sampler: Samples, endpoint_id: str, event_type: Annotated[EventType, Form()]
) -> HTMLResponse:
    outcome = await sampler.send(caller, endpoint_id, event_type)
    return render(request, "tested.html", outcome=outcome)


@router.get("/{endpoint_id}/deliveries/{delivery_id}")
def show_delivery(request: Request, session: Session, caller: Caller, endpoint_id: str, delivery_id: str) -> HTMLResponse:
    detail = DeliveryDetail.of(delivery_log.get(session, caller, endpoint_id, delivery_id))
    return render(
        request,
        "delivery.html",
        endpoint=webhooks.get(session, caller, endpoint_id),
        delivery=detail,
        pretty=json.dumps(json.loads(detail.body), indent=2, ensure_ascii=False),
    )


@router.post("/{endpoint_id}/deliveries/{delivery_id}/replay")
def replay_delivery(request: Request, session: Session, caller: Caller, endpoint_id: str, delivery_id: str) -> HTMLResponse:
    delivery_log.replay(session, caller, endpoint_id, delivery_id)
    return _shown(request, session, caller, endpoint_id)


def _listed(request: Request, session: orm.Session, caller: ApiCaller, *, made: Made | None = None) -> HTMLResponse:
    endpoints, _ = webhooks.list_page(session, caller, after=None, limit=MOST)
    return render(request, "webhooks.html", endpoints=endpoints, types=list(EventType), made=made)


def _switched(
    request: Request, session: orm.Session, caller: ApiCaller, settings: AllSettings, endpoint_id: str, *, is_enabled: bool
) -> HTMLResponse:
    webhooks.update(session, caller, endpoint_id, request=EndpointUpdate(is_enabled=is_enabled), settings=settings.webhooks)
    return _shown(request, session, caller, endpoint_id)


def _shown(request: Request, session: orm.Session, caller: ApiCaller, endpoint_id: str) -> HTMLResponse:
    found, _ = delivery_log.list_page(session, caller, endpoint_id, status=None, event_type=None, after=None, limit=MOST)
    endpoint = webhooks.get(session, caller, endpoint_id)
    return render(request, "webhook.html", endpoint=endpoint, deliveries=[DeliveryOut.of(one) for one in found])
