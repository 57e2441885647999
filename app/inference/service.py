"""Chats and completions, whole or streamed, in the words of the OpenAI API."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app import idempotency
from app.accounts.caller import Caller
from app.core import ids
from app.core.engine import Chunk, GenerateRequest, ToldToken
from app.core.errors import AppError, BadRequest
from app.core.render import RenderError
from app.inference import logprobs
from app.inference.calls import Speech
from app.inference.gateway import Answers, Gateway, Target
from app.inference.schemas import ChatRequest, CompletionRequest, Usage

T = TypeVar("T")


@dataclass(frozen=True)
class Whole:
    """All of an answer. `tokens` where logprobs were asked for."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    tokens: tuple[ToldToken, ...] = ()


class Answer:
    """How one endpoint writes its objects: the two differ in names only. It is of one request."""

    def __init__(self, target: Target, request: ChatRequest | CompletionRequest) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        self._told_characters = Counter[int]()  # of each streamed answer's tokens
        self._speeches = _speeches(target, request) if isinstance(request, ChatRequest) else {}
        self._common = {
            "id": ids.new("chatcmpl-" if self._is_chat else "cmpl-"),
            "created": int(time.time()),
            "model": target.model,
            "base_model": target.base.id,
            **({"alias": target.alias} if target.alias else {}),
            "system_fingerprint": None,
        }

    def whole(self, answers: Sequence[Whole]) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        completion_tokens = sum(answer.completion_tokens for answer in answers)
        usage = Usage.of(answers[0].prompt_tokens, completion_tokens, cached_tokens=answers[0].cached_tokens)
        choices = [self._whole_choice(number, answer) for number, answer in enumerate(answers)]
        return self._object(kind, choices, usage.model_dump())

    def opening(self, number: int) -> dict[str, Any] | None:
        """The chunk that names the speaker, for chats."""
        return self._chunk(number, {"delta": {"role": "assistant", "content": "", "refusal": None}}) if self._is_chat else None

    def pieces(self, number: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """What is to be told of it, if anything: what may become a call is held back."""
        text, calls, finish_reason = self._said(number, chunk.text, chunk.finish_reason)
        if calls:
            listed = [{"index": index, **call} for index, call in enumerate(calls)]
            yield self._chunk(number, {"delta": {"tool_calls": listed}})
        if text or chunk.tokens or finish_reason:
            said = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
            yield self._chunk(number, said, finish_reason, chunk.tokens)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return self._object("chat.completion.chunk" if self._is_chat else "text_completion", [], usage.model_dump())

    def _said(self, number: int, text: str, finish_reason: str | None) -> tuple[str, list[dict[str, Any]], str | None]:
        """New text, and at the end the calls that were held back as text."""
        speech = self._speeches.get(number)
        if speech is None:
            return text, [], finish_reason
        told = speech.push(text)
        if finish_reason is None:
            return told, [], None
        rest, calls = speech.end()
        return told + rest, calls, "tool_calls" if calls else finish_reason

    def _whole_choice(self, number: int, answer: Whole) -> dict[str, Any]:
        text, calls, finish_reason = self._said(number, answer.text, answer.finish_reason)
        if not self._is_chat:
            return self._choice(number, {"text": text}, finish_reason, answer.tokens)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return self._choice(number, {"message": message}, finish_reason, answer.tokens)

    def _chunk(
        self, number: int, said: dict[str, Any], finish_reason: str | None = None, tokens: Sequence[ToldToken] = ()
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._object(kind, [self._choice(number, said, finish_reason, tokens)], None)

    def _choice(
        self, number: int, said: dict[str, Any], finish_reason: str | None, tokens: Sequence[ToldToken]
    ) -> dict[str, Any]:
        return {"index": number, **said, "logprobs": self._logprobs(number, tokens), "finish_reason": finish_reason}

    def _logprobs(self, number: int, tokens: Sequence[ToldToken]) -> dict[str, Any] | None:
        if not tokens:
            return None
        if self._is_chat:
            return logprobs.of_chat(tokens)
        start = self._told_characters[number]
        told = logprobs.of_text(tokens, start=start)
        self._told_characters[number] = start + sum(map(len, told["tokens"]))
        return told

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {"object": kind, **self._common, "choices": choices, "usage": usage}


def _speeches(target: Target, request: ChatRequest) -> dict[int, Speech]:
    """Of each answer, where tools were offered."""
    names = {tool["function"]["name"] for tool in request.offered_tools}
    most = 1 if request.parallel_tool_calls is False else None
    return {number: Speech(target.renderer.call_opening, names, most=most) for number in range(request.answers if names else 0)}


async def prepare(
    gateway: Gateway, caller: Caller, request: ChatRequest | CompletionRequest, request_id: str
) -> tuple[Target, GenerateRequest]:
    """Find the model, render the prompt, see that it fits."""
    with gateway.metrics.counting_rejections():
        return await _prepare(gateway, caller, request, request_id)


async def _prepare(
    gateway: Gateway, caller: Caller, request: ChatRequest | CompletionRequest, request_id: str
) -> tuple[Target, GenerateRequest]:
    target = await gateway.target(caller, request.model, request.mix)
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    prompt = await run_in_threadpool(_tokens_of, target, request)
    if not prompt:
        raise BadRequest("the prompt is empty", param=param)
    max_tokens = gateway.room_for(target, prompt, request.asked_tokens, prompt_param=param, limit_param=request.limit_param)
    sampling = request.sampling(max_tokens)
    if any(token >= target.base.architecture.vocab for token in sampling.logit_bias):
        raise BadRequest(f"a token id is outside the vocabulary of {target.base.id}", param="logit_bias")
    wanted = GenerateRequest(
        request_id=request_id,
        tenant=caller.organization_id,
        prompt=tuple(prompt),
        sampling=sampling,
        adapter=None if request.mix or not target.shares else target.shares[0].adapter,
        mix=target.shares if request.mix else (),
    )
    return target, wanted


async def answer_whole(
    gateway: Gateway, caller: Caller, target: Target, generate: GenerateRequest, answer: Answer, *, answers: int
) -> dict[str, Any]:
    return answer.whole(await _collect(gateway, caller, target, generate, answers=answers))


async def ask(gateway: Gateway, caller: Caller, request: ChatRequest) -> Whole:
    """The same for our own processes, which ask on a customer's behalf."""
    target, generate = await prepare(gateway, caller, request, ids.new("req_"))
    (whole,) = await _collect(gateway, caller, target, generate, answers=1)
    return whole


async def _collect(gateway: Gateway, caller: Caller, target: Target, generate: GenerateRequest, *, answers: int) -> list[Whole]:
    told: list[list[Chunk]] = [[] for _ in range(answers)]
    async with gateway.open(caller, target, generate, answers=answers) as chunks:
        async for number, chunk in chunks:
            told[number].append(chunk)
    return [
        Whole(
            text="".join(chunk.text for chunk in of_answer),
            finish_reason=of_answer[-1].finish_reason or "stop",
            prompt_tokens=len(generate.prompt),
            completion_tokens=of_answer[-1].completion_tokens,
            cached_tokens=of_answer[-1].cached_tokens,
            tokens=tuple(token for chunk in of_answer for token in chunk.tokens),
        )
        for of_answer in told
    ]


async def answer_streamed(
    gateway: Gateway,
    caller: Caller,
    target: Target,
    generate: GenerateRequest,
    answer: Answer,
    *,
    answers: int,
    includes_usage: bool,
) -> StreamingResponse:
    """Server-sent events. The engine has accepted when this returns, so that refusals still get a status of their own."""
    stack = AsyncExitStack()
    chunks = await stack.enter_async_context(gateway.open(caller, target, generate, answers=answers))
    events = _events(chunks, answer, len(generate.prompt), answers=answers, includes_usage=includes_usage)
    return _EventStream(stack, events)


class _EventStream(idempotency.Stream):
    """Lets go of the engine when it ends, also if its client was gone before the first event was asked for."""

    def __init__(self, stack: AsyncExitStack, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(self._told(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)

    async def _told(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield _event(event)
        except AppError as error:
            self.has_failed = True
            yield _event(error.envelope())
        yield b"data: [DONE]\n\n"


async def _events(
    chunks: Answers, answer: Answer, prompt_tokens: int, *, answers: int, includes_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    for number in range(answers):
        if opening := answer.opening(number):
            yield opening
    completion_tokens, cached_tokens = [0] * answers, 0
    async for number, chunk in chunks:
        completion_tokens[number] = chunk.completion_tokens
        cached_tokens = cached_tokens if number else chunk.cached_tokens
        for piece in answer.pieces(number, chunk):
            yield piece
    if includes_usage:
        yield answer.usage(Usage.of(prompt_tokens, sum(completion_tokens), cached_tokens=cached_tokens))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client left first: then the work is cancelled, and with it the engine's."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _tokens_of(target: Target, request: ChatRequest | CompletionRequest) -> list[int]:
    if isinstance(request, ChatRequest):
        _require_short(target, sum(len(message.to_message().content) for message in request.messages), param="messages")
        try:
            return target.renderer.prompt([message.to_message() for message in request.messages], request.offered_tools)
        except RenderError as error:
            raise BadRequest(f"{target.base.id} cannot be told these messages: {error}", param="messages") from None
    prompt = request.one_prompt
    if isinstance(prompt, str):
        _require_short(target, len(prompt), param="prompt")
        try:
            return target.renderer.plain(prompt)
        except RenderError as error:
            raise BadRequest(str(error), param="prompt") from None
    if any(not 0 <= token < target.base.architecture.vocab for token in prompt):
        raise BadRequest(f"a token id is outside the vocabulary of {target.base.id}", param="prompt")
    return prompt


def _require_short(target: Target, characters: int, *, param: str) -> None:
    """Before seconds are spent on tokens of what cannot fit in any case. Raises BadRequest."""
    most = target.base.context_length * target.renderer.longest_token
    if characters > most:
        message = f"{target.base.id} holds {target.base.context_length} tokens; {characters} characters are more: shorten them"
        raise BadRequest(message, param=param, code="context_length_exceeded")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
