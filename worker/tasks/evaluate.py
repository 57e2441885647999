"""Put rows to models and grade the answers: a slice of an evaluation at a time, so that files and jobs never wait long."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, select

from app import db
from app.core import data, judges, limited, tracing
from app.core.data import EvaluationRow
from app.core.errors import AppError, BadRequest, Unavailable
from app.core.graders import grade, judging
from app.core.graders.process import Answered
from app.core.graders.spec import AnyGrader, Multi
from app.core.graders.template import Unfillable
from app.core.storage import Storage
from app.evaluations import grading, leases, results
from app.evaluations.asking import Asker
from app.evaluations.grading import Graded
from app.evaluations.leases import Claimed, EvaluationLost
from app.inference.gateway import EngineFailed, Gateway
from app.inference.renderers import Renderers
from app.inference.service import Whole
from app.models import EvaluationSample
from worker import patience
from worker.metrics import process_id
from worker.services import Services

log = structlog.get_logger()

SLICE_SECONDS = 10.0  # after so long nothing new is begun
GRADED_AT_ONCE, CPU_SECONDS = 64, 40
VERDICT_TOKENS = 64

T = TypeVar("T")


def evaluate_next(to: Services) -> bool:
    """Work on one evaluation for a while; False when none waits."""
    with to.sessions.begin() as session:
        claimed = leases.claim(session, owner=process_id(), settings=to.settings.leases, limits=to.settings.evaluations)
    if claimed is None:
        return False
    try:
        with (
            to.in_hand.holding(lambda session: leases.rest(session, claimed.lease)),
            tracing.span("evaluate", evaluation_id=claimed.lease.evaluation_id, attempt=claimed.lease.attempt),
        ):
            _work(to, claimed)
    except EvaluationLost:
        log.info("evaluation_lost", evaluation_id=claimed.lease.evaluation_id)
    return True


def _work(to: Services, claimed: Claimed) -> None:
    """Raises EvaluationLost."""
    lease, settings = claimed.lease, to.settings.leases

    def say(words: Callable[..., T], **more: Any) -> T:
        return patience.say(to.sessions, lambda session: words(session, lease, **more))

    try:
        rows = _rows(to.storage, claimed)
        found = asyncio.run(_Slice(to, claimed, rows).run())
    except EvaluationLost:
        raise
    except (Unavailable, *db.OUTAGE) as error:
        log.warning("evaluation_postponed", evaluation_id=lease.evaluation_id, error=type(error).__name__)
        say(leases.wait, reason=str(error) if isinstance(error, Unavailable) else "the database does not answer")
    except (EngineFailed, limited.Died) as error:
        log.warning("evaluation_slice_broke", evaluation_id=lease.evaluation_id, reason=str(error))
        reason = "an answer could not be graded" if isinstance(error, limited.Died) else str(error)
        say(leases.failed, reason=reason, settings=settings)
    except AppError as error:
        say(leases.fail, code=error.code or "invalid_value", message=str(error), param=error.param)
    except Exception as error:
        log.exception("evaluation_failed", evaluation_id=lease.evaluation_id)
        say(leases.failed, reason=type(error).__name__, settings=settings)
    else:
        _conclude(say, found)


def _conclude(say: Callable[..., None], found: dict[str, Any] | None) -> None:
    if found is None:
        say(leases.rest)
    elif results.scored(found):
        say(leases.finish, results=found)
    else:
        message = "no answer could be scored: GET its results for the reason of each"
        say(leases.fail, code="nothing_scored", message=message, param=None)


class _Slice:
    """Some seconds of one evaluation. Everything is written down as it is known, and asked of the rows what is still to do."""

    def __init__(self, to: Services, claimed: Claimed, rows: Sequence[EvaluationRow]) -> None:
        self._to, self._claimed, self._rows = to, claimed, rows
        self._request, self._models = claimed.request, claimed.request.models
        self._graders = claimed.request.graders_for(claimed.format)
        self._is_ours = EvaluationSample.evaluation_id == claimed.lease.evaluation_id
        self._ends_at = time.monotonic() + SLICE_SECONDS

    async def run(self) -> dict[str, Any] | None:
        """The results, once there is nothing left to do. Raises what stopped the work."""
        settings = self._to.settings
        gateway = Gateway(
            self._to.sessions, self._to.catalog, _renderers(self._to.storage), settings.inference, settings.engine_token
        )
        asker = Asker(gateway, judges.load(settings.evaluations.judges_file))
        self._ask, self._judge = partial(asker.ask, self._claimed.caller), partial(asker.judge, self._claimed.caller)
        working, beating = asyncio.create_task(self._advance()), asyncio.create_task(self._beat())
        try:
            done, _ = await asyncio.wait((working, beating), return_when=asyncio.FIRST_COMPLETED)
            return await done.pop()
        finally:
            for task in (working, beating):
                task.cancel()
            await asyncio.gather(working, beating, return_exceptions=True)
            await asker.close()
            await gateway.close()

    async def _beat(self) -> dict[str, Any] | None:
        """An answer may take longer than a lease."""
        settings = self._to.settings.leases
        while True:
            await asyncio.sleep(settings.heartbeat_seconds)
            await self._say(leases.extend, settings=settings)

    async def _advance(self) -> dict[str, Any] | None:
        if await self._answer() and await self._grade() and await self._judge_pairs():
            names = [grader.name for grader in self._graders]
            samples = await asyncio.to_thread(self._samples)
            return await asyncio.to_thread(
                partial(results.of, samples, models=self._models, graders=names, seed=self._request.seed)
            )
        return None

    async def _answer(self) -> bool:
        """Ask what has not been asked. Returns whether all has."""
        known = await asyncio.to_thread(self._known_positions)
        missing = [position for position in range(len(self._rows) * len(self._models)) if position not in known]
        return await self._each(missing, self._answer_one)

    async def _answer_one(self, position: int) -> None:
        row, model = self._rows[position // len(self._models)], self._models[position % len(self._models)]
        sampling = self._request.sampling.model_dump(exclude={"max_tokens"})
        answer: Whole | None = None
        error: dict[str, str | None] | None = None
        try:
            answer = await self._ask(
                model, self._prompt(row), max_tokens=self._request.max_tokens_for(self._claimed.format), **sampling
            )
        except Unfillable as unfillable:
            error = {"code": "invalid_variable", "message": str(unfillable), "param": "input"}
        except BadRequest as refused:  # this row is too long for the model, or nothing that its template can show
            error = {"code": refused.code, "message": str(refused), "param": refused.param}
        await self._say(leases.record_answer, position=position, line=row.line, model=model, answer=answer, error=error)

    async def _grade(self) -> bool:
        """Grade what has not been graded. Returns whether all is."""
        waiting = await asyncio.to_thread(self._samples, EvaluationSample.grades.is_(None))
        for start in range(0, len(waiting), GRADED_AT_ONCE):
            if start and time.monotonic() > self._ends_at:
                return False
            part = waiting[start : start + GRADED_AT_ONCE]
            answers = [self._answered(sample) for sample in part]
            told = await asyncio.to_thread(partial(grading.by_rule, self._graders, answers, cpu_seconds=CPU_SECONDS))
            if told.refused:
                raise BadRequest(told.refused, param="graders", code="invalid_grader")
            if not await self._each(list(zip(part, answers, told.grades, strict=True)), self._grade_one):
                return False
        return True

    async def _grade_one(self, of: tuple[EvaluationSample, Answered, dict[str, grade.Grade]]) -> None:
        sample, answered, by_key = of
        graded = await grading.with_judges(self._graders, answered, by_key, self._judge)
        await self._say(leases.record_grades, position=sample.position, grades=_named(self._graders, graded))

    async def _judge_pairs(self) -> bool:
        """Let the judge compare what it has not compared. Returns whether it has all."""
        if self._request.pairwise is None:
            return True
        samples = await asyncio.to_thread(self._samples, EvaluationSample.answer.is_not(None))
        firsts = {sample.line: sample for sample in samples if sample.model == self._models[0]}
        pairs = [
            (sample, firsts[sample.line])
            for sample in samples
            if sample.model != self._models[0] and sample.verdict is None and sample.line in firsts
        ]
        return await self._each(pairs, self._judge_pair)

    async def _judge_pair(self, pair: tuple[EvaluationSample, EvaluationSample]) -> None:
        ours, first = pair
        preferred = [await self._prefers(ours, first), await self._prefers(first, ours)]
        verdict = {"preferred": preferred, "outcome": results.outcome(preferred)}
        await self._say(leases.record_verdict, position=ours.position, verdict=verdict)

    async def _prefers(self, first: EvaluationSample, second: EvaluationSample) -> str | None:
        """The place that the judge prefers, None if it does not say."""
        assert self._request.pairwise is not None
        prompt = self._prompt(self._row_of(first))
        asked = judging.compare_messages(prompt, first.answer or "", second.answer or "", self._request.pairwise.criteria)
        try:
            reply = await self._judge(self._request.pairwise.judge, asked, max_tokens=VERDICT_TOKENS, temperature=0.0)
            return judging.verdict_in(reply.text)
        except (judging.Unreadable, BadRequest):  # the second: two answers may be longer than the judge can read
            return None

    async def _each(self, todo: Sequence[T], work: Callable[[T], Awaitable[None]]) -> bool:
        """Some at once, until all are done or the slice is over. Returns whether all are. Raises the first failure."""
        waiting = iter(todo)

        async def one_after_another() -> None:
            for each in waiting:
                await work(each)
                if time.monotonic() > self._ends_at:
                    return

        at_once = min(self._to.settings.evaluations.at_once, len(todo))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(at_once):
                    tasks.create_task(one_after_another())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return next(waiting, None) is None

    async def _say(self, words: Callable[..., T], **more: Any) -> T:
        lease = self._claimed.lease
        return await asyncio.to_thread(patience.say, self._to.sessions, lambda session: words(session, lease, **more))

    def _samples(self, *which: ColumnElement[bool]) -> Sequence[EvaluationSample]:
        with self._to.sessions.begin() as session:
            found = select(EvaluationSample).where(self._is_ours, *which).order_by(EvaluationSample.position)
            return session.scalars(found).all()

    def _known_positions(self) -> set[int]:
        with self._to.sessions.begin() as session:
            return set(session.scalars(select(EvaluationSample.position).where(self._is_ours)))

    def _prompt(self, row: EvaluationRow) -> Sequence[dict[str, str]]:
        """Raises Unfillable."""
        if row.prompt is not None:
            return row.prompt
        assert self._request.input is not None
        return [message.filled(row.item) for message in self._request.input]

    def _row_of(self, sample: EvaluationSample) -> EvaluationRow:
        return self._rows[sample.position // len(self._models)]

    def _answered(self, sample: EvaluationSample) -> Answered:
        return Answered(item=self._row_of(sample).item, output_text=sample.answer or "")


def _named(graders: Iterable[AnyGrader], graded: Graded) -> dict[str, Any]:
    """By the graders' names, each with what its parts gave."""
    named = dict[str, Any]()
    for index, (grader, given) in enumerate(zip(graders, graded.grades, strict=True)):
        named[grader.name] = given.model_dump(exclude_none=True) | {"score": given.score}
        if isinstance(grader, Multi):
            named[grader.name]["parts"] = {name: graded.parts[f"{index}.{name}"].score for name in grader.graders}
    return named


def _rows(storage: Storage, claimed: Claimed) -> list[EvaluationRow]:
    """Of a file that was found valid, and has the size of one that may be evaluated. Raises AppError if it is another by now."""
    content = storage.get(claimed.storage_key)
    if hashlib.sha256(content).hexdigest() != claimed.sha256:
        raise BadRequest("the stored file differs from what was uploaded", param="file", code="file_damaged")
    return list(data.read_evaluation(data.split_lines([content])))


@cache
def _renderers(storage: Storage) -> Renderers:
    """This process's own: a tokenizer takes a while to read."""
    return Renderers(storage)
