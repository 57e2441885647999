"""Grades of answers by all of their graders: rules in a process with limits, judges by asking them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from app.core import limited
from app.core.errors import AppError, NotFound, Unavailable
from app.core.graders import grade, judging
from app.core.graders import process as grading_process
from app.core.graders.grade import Grade
from app.core.graders.process import Answered, Order, Told
from app.core.graders.spec import LOCAL, AnyGrader, ScoreModel, singles
from app.core.graders.template import Sample, Unfillable
from app.inference.gateway import EngineFailed
from app.inference.service import Whole

JUDGE_TOKENS = 256
LEAST_CPU_SECONDS = 5  # for one answer

Judging = Callable[..., Awaitable[Whole]]  # (model, messages, **sampling)


@dataclass
class Graded:
    """One answer's grades: `grades` in the graders' order, `parts` of each single grader, and what judges have used."""

    grades: list[Grade]
    parts: dict[str, Grade]
    judge_tokens: dict[str, int] = field(default_factory=dict)


def by_rule(graders: list[AnyGrader], answers: Sequence[Answered], *, cpu_seconds: int) -> Told:
    """What needs no judge. An answer that takes too much is found by halves, and has no score. Raises limited.Died."""
    if not any(isinstance(grader, LOCAL) for _, grader in singles(graders)):
        return Told(grades=[{} for _ in answers])
    try:
        return grading_process.run(Order(graders=graders, answers=list(answers)), cpu_seconds=cpu_seconds)
    except limited.TookTooMuch as error:
        if len(answers) == 1:
            spent = Grade(score=None, error="other_error", message=f"grading took {error}")
            return Told(grades=[{key: spent for key, grader in singles(graders) if isinstance(grader, LOCAL)}])
        if not answers:
            return Told(refused=f"the graders took {error}; make their schemas smaller")
    half = len(answers) // 2
    seconds = max(LEAST_CPU_SECONDS, cpu_seconds // 2)
    first, second = (by_rule(graders, part, cpu_seconds=seconds) for part in (answers[:half], answers[half:]))
    return Told(grades=first.grades + second.grades)


async def with_judges(graders: list[AnyGrader], answered: Answered, by_key: Mapping[str, Grade], ask: Judging) -> Graded:
    """All grades of an answer whose grades by rule are known. Raises Unavailable or EngineFailed: a judge may answer later."""
    parts, tokens = dict(by_key), dict[str, int]()
    judges = [(key, grader) for key, grader in singles(graders) if isinstance(grader, ScoreModel)]
    judged = await asyncio.gather(*(_judge(grader, answered, ask) for _, grader in judges))
    for (key, grader), (given, used) in zip(judges, judged, strict=True):
        parts[key] = given
        tokens[grader.model] = tokens.get(grader.model, 0) + used
    return Graded(grade.combine(graders, parts), parts, tokens)


async def _judge(grader: ScoreModel, answered: Answered, ask: Judging) -> tuple[Grade, int]:
    sampling = grader.sampling_params
    used = 0
    try:
        messages = judging.score_messages(grader, answered.item, Sample(answered.output_text))
        reply = await ask(
            grader.model,
            messages,
            max_tokens=sampling.max_completions_tokens or JUDGE_TOKENS,
            temperature=sampling.temperature or 0.0,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        used = reply.prompt_tokens + reply.completion_tokens
        return Grade(score=judging.score_in(reply.text, grader)), used
    except Unfillable as error:
        return Grade(score=None, error="invalid_variable_error", message=str(error)), used
    except judging.Unreadable as error:
        return Grade(score=None, error="model_grader_parse_error", message=str(error)), used
    except (Unavailable, NotFound, EngineFailed):
        raise
    except AppError as error:
        return Grade(score=None, error="model_grader_server_error", message=str(error)), used
