"""From a request to the text of an engine: model, route, stream, meter."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import structlog
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from sqlalchemy import orm
from sqlalchemy.dialects.postgresql import insert
from starlette.concurrency import run_in_threadpool

from app import db
from app.accounts.caller import Caller
from app.adapters import names
from app.adapters import service as adapters
from app.adapters.names import Named
from app.core import crash, ids, tracing
from app.core.catalog import Base, Catalog
from app.core.engine import Chunk, GenerateRequest, Share
from app.core.errors import AppError, BadRequest, Conflict, RateLimited, Unavailable
from app.core.render import Renderer
from app.core.settings import InferenceSettings
from app.inference import engines
from app.inference.renderers import Renderers
from app.metrics import GatewayMetrics
from app.models import Adapter, Engine, UsageRecord

log = structlog.get_logger()

RECORD_PAUSES_SECONDS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60, 60)  # before further attempts to write usage down
CLOSE_SECONDS = 5.0
CONNECT_SECONDS, BETWEEN_CHUNKS_SECONDS = 2.0, 600.0  # the first chunk may wait for a place in the batch


class EngineFailed(AppError):
    """An engine refused or broke; its own envelope is passed on where it has one."""

    def __init__(self, status: int, message: str, *, type: str, code: str | None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.status, self.type = status, type  # type: ignore[misc]  # fixed for other errors, the engine's word here


class BaseNotServed(Conflict):
    """Engines are there and none of this base: nothing that waiting would change."""

    code, param = "base_not_loaded", "model"


@dataclass(frozen=True)
class Target:
    """A model name, understood: its base, its adapter if it has one, and the engines that can answer. `model` is the one behind
    `alias`, where it was asked for by that. A mix has the name of its base."""

    model: str
    alias: str | None
    base: Base
    shares: tuple[Share, ...]
    engines: Sequence[Engine]
    renderer: Renderer


@dataclass
class Meter:
    """What a request has used so far, in each of its answers."""

    prompt_tokens: int
    by_answer: list[int]
    opened_at: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None

    def note(self, number: int, chunk: Chunk) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.opened_at
        self.by_answer[number] = max(self.by_answer[number], chunk.completion_tokens)

    @property
    def answers(self) -> int:
        return len(self.by_answer)

    @property
    def completion_tokens(self) -> int:
        return sum(self.by_answer)


Answers = AsyncIterator[tuple[int, Chunk]]


class Gateway:
    """Holds what all requests share: connections to the engines, renderers, sessions."""

    def __init__(
        self,
        sessions: orm.sessionmaker[orm.Session],
        catalog: Catalog,
        renderers: Renderers,
        settings: InferenceSettings,
        engine_token: SecretStr,
        *,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        """`metrics` are where the API counts; who asks on a customer's behalf counts nowhere."""
        self.metrics = metrics or GatewayMetrics(CollectorRegistry())
        self._sessions, self._catalog, self._renderers, self._settings = sessions, catalog, renderers, settings
        self._recording: set[asyncio.Task[None]] = set()
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {engine_token.get_secret_value()}"},
            timeout=httpx.Timeout(BETWEEN_CHUNKS_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def close(self) -> None:
        await self._client.aclose()
        if self._recording:
            await asyncio.wait(self._recording, timeout=CLOSE_SECONDS)

    async def target(self, caller: Caller, model: str, mix: Sequence[tuple[str, float]] = ()) -> Target:
        """What these names mean to this caller. Raises NotFound, BaseNotServed, or Unavailable when its engines are away, and
        BadRequest for models that cannot be mixed."""
        return await run_in_threadpool(self._target, caller, model, mix)

    def _target(self, caller: Caller, model: str, mix: Sequence[tuple[str, float]]) -> Target:
        with db.organization_session(self._sessions, caller.organization_id) as session:
            named = names.resolve(session, caller, self._catalog, model, param="model")
            mixed = [names.resolve(session, caller, self._catalog, name, param=_part(at)) for at, (name, _) in enumerate(mix)]
            if mixed:
                _require_mixable(named, mixed)
            held = [one.adapter for one in mixed or [named] if one.adapter]
            weights = [weight for _, weight in mix] or [1.0] * len(held)
            shares = tuple(Share(adapter=adapters.ref_of(one), weight=weight) for one, weight in zip(held, weights, strict=True))
            serving = self._serving(session, named.base, held[0] if held else None)
        renderer = self._renderers.get(named.base.id, serving[0].base_digest)
        return Target(named.model, named.alias, named.base, shares, serving, renderer)

    def _serving(self, session: orm.Session, base: Base, adapter: Adapter | None) -> Sequence[Engine]:
        """The engines that can answer. Raises Unavailable when they are away, BaseNotServed when there are none."""
        ref = adapters.ref_of(adapter) if adapter else None
        live = engines.list_live(session, timeout_seconds=self._settings.heartbeat_timeout_seconds)
        if serving := engines.answering(live, base.id, ref):
            return serving
        if not live or engines.answering(engines.list_expected(session), base.id, ref):
            raise Unavailable(f"no engine serves {base.id} just now; try again shortly", code="base_not_loaded")
        if adapter and any(engine.base == base.id for engine in live):
            raise BaseNotServed(_not_held(adapter, adapters.quantization_of(session, adapter).name, live))
        served = ", ".join(sorted({engine.base for engine in live}))
        raise BaseNotServed(
            f"no engine serves {base.id}, only {served}: use a model on that, or have an engine started with "
            f"TUNESMITH_INFERENCE__BASE={base.id}"
        )

    def room_for(
        self, target: Target, prompt: Sequence[int], asked_tokens: int | None, *, prompt_param: str, limit_param: str
    ) -> int:
        """How many tokens the answer may have. Raises BadRequest, for the one parameter that is to blame, when the context cannot
        hold what was asked."""
        room = target.base.context_length - len(prompt)
        if room >= (asked_tokens or 1):
            return asked_tokens or min(room, self._settings.default_max_tokens)
        remedy = f"shorten the prompt or lower {limit_param}" if asked_tokens else "shorten the prompt"
        message = (
            f"{target.base.id} holds {target.base.context_length} tokens; the prompt has {len(prompt)} and the answer "
            f"may have {asked_tokens or 1}: {remedy}"
        )
        raise BadRequest(message, param=prompt_param if room < 1 else limit_param, code="context_length_exceeded")

    @asynccontextmanager
    async def open(self, caller: Caller, target: Target, request: GenerateRequest, *, answers: int = 1) -> AsyncIterator[Answers]:
        """The chunks of one or more answers to a prompt, each with the number of its answer.

        Entering waits for an engine to accept; leaving early frees its work. Metered once, the prompt as one.
        """
        meter = Meter(len(request.prompt), [0] * answers)
        opened = self._one(target, request, meter) if answers == 1 else self._several(target, request, meter)
        async with AsyncExitStack() as stack:
            with self.metrics.counting_rejections():
                chunks = await stack.enter_async_context(opened)
            try:
                yield self._counted(chunks)
            finally:
                self.metrics.answered(
                    target.base.id,
                    prompt_tokens=meter.prompt_tokens,
                    completion_tokens=meter.completion_tokens,
                    first_token_seconds=meter.first_token_seconds,
                )
                with anyio.CancelScope(shield=True):  # the client may be gone: what was used is written down all the same
                    await self._write_down(_usage_of(caller, target, request.request_id, meter))

    async def _counted(self, chunks: Answers) -> Answers:
        """Where it breaks off, and not where that is heard: a stream tells it as an event."""
        with self.metrics.counting_rejections():
            async for chunk in chunks:
                yield chunk

    @asynccontextmanager
    async def _one(self, target: Target, request: GenerateRequest, meter: Meter, *, number: int = 0) -> AsyncIterator[Answers]:
        async with self._accepted(target, request) as response:
            yield _chunks(response, meter, number)

    @asynccontextmanager
    async def _several(self, target: Target, request: GenerateRequest, meter: Meter) -> AsyncIterator[Answers]:
        """Side by side, their chunks as they come; the first failure is everyone's. Readers that are slow are waited for.

        The first is asked for alone until it speaks: the others then find the prompt read.
        """
        told = asyncio.Queue[tuple[int, Chunk] | Exception](maxsize=4 * meter.answers)
        is_prompt_read = asyncio.Event()

        async def follow(number: int) -> None:
            try:
                if number:
                    await is_prompt_read.wait()
                async with self._one(target, _variant(request, number), meter, number=number) as chunks:
                    async for chunk in chunks:
                        is_prompt_read.set()
                        await told.put(chunk)
            except Exception as error:  # whoever reads raises it
                await told.put(error)

        following = [asyncio.create_task(follow(number)) for number in range(meter.answers)]
        try:
            yield _merged(_raised(await told.get()), told, meter.answers)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    @asynccontextmanager
    async def _accepted(self, target: Target, request: GenerateRequest) -> AsyncIterator[httpx.Response]:
        """The streaming response of the first engine that takes the request; unreachable and full ones are passed over."""
        failure: AppError = Unavailable(f"no engine of {target.base.id} answers; try again shortly", code="engine_unavailable")
        path = "blend" if request.mix else "generate"
        for engine in engines.ranked(target.engines, [share.adapter for share in target.shares]):
            sent = self._client.build_request(
                "POST", f"{engine.url}/{path}", content=request.model_dump_json(), headers=tracing.headers()
            )
            try:
                response = await self._client.send(sent, stream=True)
            except httpx.TransportError as error:
                log.warning("engine_unreachable", engine=engine.id, error=type(error).__name__)
                continue
            try:
                if response.status_code == httpx.codes.OK:
                    yield response
                    return
                failure = await _failure_of(response)
            finally:
                await response.aclose()
            if failure.status != httpx.codes.SERVICE_UNAVAILABLE:
                break
        raise failure

    async def _write_down(self, record: dict[str, Any]) -> None:
        """Before the answer ends; beside it if the database is away, which is no fault of the answer's."""
        if not await self._try_insert(record):
            task = asyncio.create_task(self._insert_later(record))
            self._recording.add(task)
            task.add_done_callback(self._recording.discard)

    async def _insert_later(self, record: dict[str, Any]) -> None:
        for pause_seconds in RECORD_PAUSES_SECONDS:
            await asyncio.sleep(pause_seconds)
            if await self._try_insert(record):
                return
        log.error("usage_lost", **record)

    async def _try_insert(self, record: dict[str, Any]) -> bool:
        try:
            await run_in_threadpool(self._insert_usage, record)
        except Exception as error:
            log.warning("usage_not_recorded", usage=record["id"], error=type(error).__name__)
            return False
        return True

    def _insert_usage(self, record: dict[str, Any]) -> None:
        crash.point("usage_unrecorded")
        with db.organization_session(self._sessions, record["organization_id"]) as session:
            # an outage may have hidden that it was written
            session.execute(insert(UsageRecord).values(record).on_conflict_do_nothing())
        crash.point("usage_recorded")


def _part(number: int) -> str:
    return f"adapters.{number}.model"


def _require_mixable(named: Named, mixed: Sequence[Named]) -> None:
    """Raises BadRequest."""
    if named.adapter:
        message = f"with adapters, model must be the base that they are added to: {named.base.id}"
        raise BadRequest(message, param="model")
    for number, one in enumerate(mixed):
        if one.adapter is None:
            raise BadRequest(f"{one.model} is a base: there is nothing of it to add", param=_part(number))
        if one.base.id != named.base.id:
            message = f"{one.model} was trained on {one.base.id} and cannot be added to {named.base.id}"
            raise BadRequest(message, param=_part(number))
        if one.adapter.id in {other.adapter.id for other in mixed[:number] if other.adapter}:
            raise BadRequest(f"{one.model} is in the mix already; give it one weight", param=_part(number))
        if mixed[0].adapter and one.adapter.base_digest != mixed[0].adapter.base_digest:
            message = f"{one.model} was trained on {one.base.id} held in another way than {mixed[0].model}: they cannot be mixed"
            raise BadRequest(message, param=_part(number))


def _not_held(adapter: Adapter, quantization: str, live: Sequence[Engine]) -> str:
    """Why none of the engines of its base can answer for it."""
    held = sorted({engine.quantization for engine in live if engine.base == adapter.base})
    if quantization in held:
        return f"{adapter.name} was trained on other weights of {adapter.base} than engines hold now: train it anew"
    return (
        f"{adapter.name} was trained on {adapter.base} held in {quantization}, and engines hold it in {', '.join(held)} only: "
        f"have one started with TUNESMITH_INFERENCE__QUANTIZATION={quantization}"
    )


def _usage_of(caller: Caller, target: Target, request_id: str, meter: Meter) -> dict[str, Any]:
    return {
        "id": ids.new("usage_"),
        "organization_id": caller.organization_id,
        "project_id": caller.project_id,
        "request_id": request_id,
        "api_key_id": caller.key_id,
        "model": target.model,
        "base": target.base.id,
        "prompt_tokens": meter.prompt_tokens,
        "completion_tokens": meter.completion_tokens,
    }


def _variant(request: GenerateRequest, number: int) -> GenerateRequest:
    """The same asked once more: with a seed, each answer has another and the whole can be had again."""
    seed = request.sampling.seed
    changes = {} if seed is None or number == 0 else {"seed": seed + number}
    return request.model_copy(update={"sampling": request.sampling.model_copy(update=changes)})


async def _merged(first: tuple[int, Chunk], told: "asyncio.Queue[tuple[int, Chunk] | Exception]", answers: int) -> Answers:
    """From `first` on, until each answer is finished. Raises what one of them raised."""
    number, chunk = first
    while True:
        yield number, chunk
        answers -= chunk.finish_reason is not None
        if not answers:
            return
        number, chunk = _raised(await told.get())


def _raised(said: tuple[int, Chunk] | Exception) -> tuple[int, Chunk]:
    if isinstance(said, Exception):
        raise said
    return said


async def _chunks(response: httpx.Response, meter: Meter, number: int) -> Answers:
    """Raises EngineFailed when the stream ends without a finish."""
    try:
        async for line in response.aiter_lines():
            chunk = Chunk.model_validate_json(line)
            meter.note(number, chunk)
            if chunk.error is not None:
                raise EngineFailed(500, chunk.error, type="server_error", code="engine_failed")
            yield number, chunk
            if chunk.finish_reason:
                return
    except httpx.HTTPError as error:
        log.warning("engine_broke_off", error=type(error).__name__)
    raise EngineFailed(502, "the engine broke off; send the request again", type="server_error", code="engine_failed")


async def _failure_of(response: httpx.Response) -> AppError:
    await response.aread()
    try:
        told = response.json()["error"]
    except (ValueError, KeyError):
        if response.status_code == httpx.codes.NOT_FOUND:
            return Unavailable(
                "an engine that mixes adapters is needed, and this one is of an older release", code="engine_outdated"
            )
        return EngineFailed(502, "the engine answered with an error", type="server_error", code="engine_failed")
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return Unavailable(told["message"], code=told["code"])
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimited(told["message"], code=told["code"])
    return EngineFailed(response.status_code, told["message"], type=told["type"], code=told["code"], param=told["param"])
