from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from app.core.engine import Heartbeat
from app.deps import Caller
from app.idempotency import IdempotentRoute
from app.inference import engines
from app.inference import service as inference
from app.inference.gateway import Gateway
from app.inference.schemas import ChatRequest, CompletionRequest
from app.metrics import CLIENT_LEFT

router = APIRouter(prefix="/v1", tags=["Inference"], route_class=IdempotentRoute)
internal = APIRouter(prefix="/internal", include_in_schema=False)


def get_gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


InferenceGateway = Annotated[Gateway, Depends(get_gateway)]


@router.post("/chat/completions", response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, caller: Caller, gateway: InferenceGateway) -> Response:
    """Talk to a base model or to a model of yours."""
    return await _answer(body, request, caller, gateway)


@router.post("/completions", response_model=None)
async def create_completion(body: CompletionRequest, request: Request, caller: Caller, gateway: InferenceGateway) -> Response:
    """Continue a text."""
    return await _answer(body, request, caller, gateway)


@internal.post("/engines", status_code=204)
def record_heartbeat(beat: Heartbeat, request: Request) -> None:
    """An engine says that it lives, where, and what it holds; or that it leaves."""
    timeout_seconds = request.app.state.settings.inference.heartbeat_timeout_seconds
    with request.app.state.sessions.begin() as session:
        engines.record(session, beat, timeout_seconds=timeout_seconds)


async def _answer(body: ChatRequest | CompletionRequest, request: Request, caller: Caller, gateway: Gateway) -> Response:
    target, generate = await inference.prepare(gateway, caller, body, request.state.request_id)
    answer = inference.Answer(target, body)
    if body.stream:
        opening = inference.answer_streamed(
            gateway, caller, target, generate, answer, answers=body.answers, includes_usage=body.includes_usage
        )
        return await inference.unless_gone(request, opening) or Response(status_code=CLIENT_LEFT)
    whole = await inference.unless_gone(
        request, inference.answer_whole(gateway, caller, target, generate, answer, answers=body.answers)
    )
    return JSONResponse(whole) if whole else Response(status_code=CLIENT_LEFT)
