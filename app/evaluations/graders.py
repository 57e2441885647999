"""One answer graded while somebody waits: the graders' own endpoints."""

import time
from functools import partial
from typing import Any, Final

from starlette.concurrency import run_in_threadpool

from app.accounts.caller import Caller
from app.core import limited
from app.core.errors import AppError, BadRequest, NotFound, Unavailable
from app.core.graders.grade import Grade
from app.core.graders.process import Answered, Told
from app.core.graders.spec import AnyGrader, JsonSchema, Multi, ScoreModel, singles
from app.evaluations import grading
from app.evaluations.asking import Asker
from app.evaluations.grading import Graded
from app.evaluations.schemas import GraderRun, GraderRunOut, RunMetadata
from app.inference.gateway import EngineFailed
from app.places import Places

CPU_SECONDS: Final = 10

_places = Places("graders run", code="graders_busy")  # each grading takes a core for half a second, or for ten


def require_usable(caller: Caller, graders: list[AnyGrader]) -> None:
    """Compile what only a process with limits should. Raises BadRequest for a schema that cannot be used, or Unavailable."""
    if any(isinstance(grader, JsonSchema) for _, grader in singles(graders)):
        _by_rule(caller, graders, [])


async def run(body: GraderRun, caller: Caller, asker: Asker) -> GraderRunOut:
    """Grade one answer. A judge that fails is told by a flag, as everything is that is no fault of the request."""
    started = time.perf_counter()
    answered = Answered(item=body.item or {}, output_text=body.model_sample)
    (by_key,) = (await run_in_threadpool(_by_rule, caller, [body.grader], [answered])).grades
    graded = await grading.with_judges([body.grader], answered, by_key, partial(_judge, asker, caller))
    return _shown(body.grader, graded, time.perf_counter() - started)


async def _judge(asker: Asker, caller: Caller, model: str, messages: Any, **sampling: Any) -> Any:
    try:
        return await asker.judge(caller, model, messages, **sampling)
    except NotFound as error:
        raise NotFound(str(error), param="grader.model", code=error.code) from None
    except (Unavailable, EngineFailed) as error:
        raise AppError(str(error), code=error.code) from None  # nobody waits for it here


def _by_rule(caller: Caller, graders: list[AnyGrader], answers: list[Answered]) -> Told:
    try:
        with _places.take(caller.organization_id):
            told = grading.by_rule(graders, answers, cpu_seconds=CPU_SECONDS)
    except limited.Died as died:
        raise Unavailable("the answer was not graded; try again shortly", code="grading_unfinished") from died
    if told.refused:
        raise BadRequest(told.refused, param="grader", code="invalid_grader")
    return told


def _shown(grader: AnyGrader, graded: Graded, seconds: float) -> GraderRunOut:
    (whole,) = graded.grades
    parts = {name: graded.parts[f"0.{name}"].score for name in grader.graders} if isinstance(grader, Multi) else {}
    said = [given for given in (whole, *graded.parts.values()) if given.error]
    return GraderRunOut(
        reward=whole.score or 0.0,
        sub_rewards=parts,
        metadata=RunMetadata(
            name=grader.name,
            type=grader.type,
            errors=_error_flags(said),
            execution_time=seconds,
            scores={grader.name: whole.score},
            token_usage=sum(graded.judge_tokens.values()) if graded.judge_tokens else None,
            sampled_model_name=grader.model if isinstance(grader, ScoreModel) else None,
        ),
        model_grader_token_usage_per_model=graded.judge_tokens,
        messages=list(dict.fromkeys(given.message for given in said if given.message)),
    )


def _error_flags(grades: list[Grade]) -> dict[str, Any]:
    """As `metadata.errors` of the API has them."""
    said = {given.error: given.message for given in grades if given.error}
    of_judge = said.get("model_grader_server_error")
    return {
        "formula_parse_error": "formula_parse_error" in said,
        "invalid_variable_error": "invalid_variable_error" in said,
        "model_grader_parse_error": "model_grader_parse_error" in said,
        "model_grader_refusal_error": False,
        "model_grader_server_error": "model_grader_server_error" in said,
        "model_grader_server_error_details": of_judge,
        "other_error": "other_error" in said,
        "python_grader_runtime_error": False,
        "python_grader_runtime_error_details": None,
        "python_grader_server_error": False,
        "python_grader_server_error_type": None,
        "sample_parse_error": "sample_parse_error" in said,
        "truncated_observation_error": False,
        "unresponsive_reward_error": False,
    }
