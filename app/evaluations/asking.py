"""Chats put to models on a customer's behalf: their own through the gateway, judges at the operator's endpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx
import structlog
from pydantic import ValidationError

from app.accounts.caller import Caller
from app.core.errors import AppError, BadRequest, Unavailable
from app.core.judges import Judge
from app.inference import service as inference
from app.inference.gateway import Gateway
from app.inference.schemas import ChatRequest
from app.inference.service import Whole

log = structlog.get_logger()

BUSY: Final = frozenset({408, 409, 429})  # an endpoint that says so may answer later, as one that fails may


class JudgeRefused(AppError):
    """The endpoint does not take what it was asked: nothing that waiting would change."""

    status, code = 502, "judge_refused"


class Asker:
    """Holds the connections to the judges' endpoints."""

    def __init__(self, gateway: Gateway, judges: Mapping[str, Judge]) -> None:
        self._gateway, self.judges = gateway, judges
        self._client = httpx.AsyncClient(follow_redirects=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, caller: Caller, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Whole:
        """The answer of a model of the caller's, who is metered. Raises BadRequest or NotFound for what will not be answered,
        Unavailable or EngineFailed for what may be later."""
        try:
            request = ChatRequest.model_validate({"model": model, "messages": list(messages), **_given(sampling)})
        except ValidationError as error:
            first = error.errors()[0]
            raise BadRequest(f"the messages cannot be asked: {first['msg']}", param="messages") from None
        return await inference.ask(self._gateway, caller, request)

    async def judge(self, caller: Caller, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any) -> Whole:
        """The same of the operator's judge of this name or, without one, of the caller's model. Raises JudgeRefused too."""
        if judge := self.judges.get(model):
            return await self._ask_judge(judge, {"model": judge.model, "messages": list(messages), **_given(sampling)})
        return await self.ask(caller, model, messages, **sampling)

    async def _ask_judge(self, judge: Judge, body: dict[str, Any]) -> Whole:
        key = judge.api_key.get_secret_value()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = await self._client.post(judge.url, json=body, headers=headers, timeout=judge.timeout_seconds)
        except httpx.TransportError as error:
            log.warning("judge_unreachable", judge=judge.model, error=type(error).__name__)
            raise Unavailable("the judge does not answer; try again shortly", code="judge_unavailable") from None
        status = response.status_code
        if status in BUSY or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise Unavailable(f"the judge answers with status {status}; try again shortly", code="judge_unavailable")
        if status != httpx.codes.OK:
            raise JudgeRefused(f"the judge refuses with status {status}; tell the operator")
        return _read(response)


def _given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def _read(response: httpx.Response) -> Whole:
    try:
        body = response.json()
        choice, usage = body["choices"][0], body.get("usage") or {}
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason") or "stop"
        return Whole(str(text), str(reason), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise JudgeRefused("the judge's endpoint answers with something else than a chat completion; tell the operator") from None
