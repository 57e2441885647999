"""What the endpoints of graders and evaluations take and give."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

from app.core import data
from app.core.clock import unix
from app.core.errors import BadRequest
from app.core.graders.spec import (
    MAX_GRADERS,
    AnyGrader,
    Grader,
    Json,
    Messages,
    ModelName,
    MultipleChoice,
    Name,
    ScoreModel,
    singles,
)
from app.core.graders.template import MAX_FILLED
from app.core.multiple_choice import ANSWER_TOKENS
from app.models import Evaluation, EvaluationSample
from app.schemas import Failure, Request, without_nul

MAX_MODELS = 8
DEFAULT_TOKENS = 256
MULTIPLE_CHOICE_GRADER = MultipleChoice(type="multiple_choice", name="accuracy")


class GraderRun(Request):
    """A grader, an answer, and the row it answers."""

    grader: Grader
    model_sample: Annotated[str, StringConstraints(max_length=MAX_FILLED)]
    item: Json | None = None


class GraderValidate(Request):
    grader: Grader


class GraderValidated(BaseModel):
    grader: dict[str, Any]


class RunMetadata(BaseModel):
    """`scores` by the names of the graders; `errors` flags, each with its details where it has some."""

    name: str
    type: str
    errors: dict[str, Any]
    execution_time: float
    scores: dict[str, float | None]
    token_usage: int | None
    sampled_model_name: str | None


class GraderRunOut(BaseModel):
    """The API's answer. `reward` is 0 where there is no score; `metadata.errors` says why, in words `messages` of ours."""

    reward: float
    sub_rewards: dict[str, float | None]
    metadata: RunMetadata
    model_grader_token_usage_per_model: dict[str, int]
    messages: list[str]


class SamplingIn(Request):
    """How the models answer. By default greedily: the same answer each time."""

    max_tokens: Annotated[int, Field(ge=1, le=16_384)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(max_length=4)] | None = None


class Pairwise(Request):
    """Each model's answers against the first model's, side by side before a judge, in both orders."""

    judge: ModelName
    criteria: Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(without_nul)] | None = None


class EvaluationCreate(Request):
    """What `POST /v1/evaluations` takes. `input` is asked for every item; chats and multiple-choice questions need none."""

    name: Name | None = None
    file: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    models: Annotated[list[ModelName], Field(min_length=1, max_length=MAX_MODELS)]
    input: Messages | None = None
    graders: Annotated[list[Grader], Field(max_length=MAX_GRADERS)] = Field(default_factory=list)
    sampling: SamplingIn = SamplingIn()
    pairwise: Pairwise | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @model_validator(mode="after")
    def _said_once(self) -> "EvaluationCreate":
        if len(set(self.models)) < len(self.models):
            raise BadRequest("models holds a name twice; name each model once", param="models")
        names = [grader.name for grader in self.graders]
        if len(set(names)) < len(names):
            raise BadRequest("two graders have one name; give each its own", param="graders")
        if self.pairwise and len(self.models) < 2:
            raise BadRequest("pairwise compares models with the first one; name at least two", param="models")
        return self

    def graders_for(self, held: str) -> list[AnyGrader]:
        """Those of the request, and before them that of multiple-choice questions."""
        return [MULTIPLE_CHOICE_GRADER, *self.graders] if held == data.MULTIPLE_CHOICE else list(self.graders)

    def max_tokens_for(self, held: str) -> int:
        return self.sampling.max_tokens or (ANSWER_TOKENS if held == data.MULTIPLE_CHOICE else DEFAULT_TOKENS)

    def judges(self) -> list[tuple[str, str]]:
        """The models that judge, each with the parameter that names it."""
        named = [
            (f"graders.{key}.model", grader.model) for key, grader in singles(self.graders) if isinstance(grader, ScoreModel)
        ]
        return [*named, *([("pairwise.judge", self.pairwise.judge)] if self.pairwise else [])]

    def require_fits(self, held: str) -> None:
        """Raises BadRequest for a request that makes no sense for rows of this format."""
        if held == data.ITEM and self.input is None:
            raise BadRequest("the file holds items: input must say what a model is asked about one", param="input")
        if held != data.ITEM and self.input is not None:
            raise BadRequest("the rows of the file say themselves what a model is asked; remove input", param="input")
        if not self.graders_for(held) and self.pairwise is None:
            raise BadRequest("nothing would be found out; name graders, or pairwise with a judge", param="graders")
        if held == data.MULTIPLE_CHOICE and any(grader.name == MULTIPLE_CHOICE_GRADER.name for grader in self.graders):
            message = f"the name {MULTIPLE_CHOICE_GRADER.name!r} is that of multiple-choice questions themselves; use another"
            raise BadRequest(message, param="graders")


class EvaluationOut(BaseModel):
    """An evaluation. `status` is queued, running, succeeded, failed or cancelled; `status_details` says what it waits for.

    `samples` is rows × models, null until the file has been read; `results` is there once it has succeeded. `job_id` names
    the job whose quality gate it decides.
    """

    id: str
    object: Literal["evaluation"] = "evaluation"
    created_at: int
    name: str | None
    job_id: str | None
    status: str
    status_details: str | None
    file: str
    models: list[str]
    request: dict[str, Any]
    samples: int | None
    answered: int
    results: dict[str, Any] | None
    error: Failure | None
    started_at: int | None
    finished_at: int | None

    @classmethod
    def of(cls, evaluation: Evaluation) -> "EvaluationOut":
        models = evaluation.request["models"]
        return cls(
            id=evaluation.id,
            created_at=unix(evaluation.created_at),
            name=evaluation.name,
            job_id=evaluation.job_id,
            status=evaluation.state,
            status_details=evaluation.status_details,
            file=evaluation.file_id,
            models=models,
            request={key: value for key, value in evaluation.request.items() if key not in ("name", "file", "models")},
            samples=None if evaluation.rows is None else evaluation.rows * len(models),
            answered=evaluation.answered,
            results=evaluation.results,
            error=Failure(**evaluation.error) if evaluation.error else None,
            started_at=unix(evaluation.started_at),
            finished_at=unix(evaluation.finished_at),
        )


class SampleOut(BaseModel):
    """What a model answered to the row on `line` of the file. `grades` by grader, null until they are given.

    `verdict` is that of pairwise judging, on the answers of all models but the first.
    """

    id: str
    object: Literal["evaluation.sample"] = "evaluation.sample"
    line: int
    model: str
    answer: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: Failure | None
    grades: dict[str, Any] | None
    verdict: dict[str, Any] | None

    @classmethod
    def of(cls, sample: EvaluationSample) -> "SampleOut":
        return cls(
            id=sample.id,
            line=sample.line,
            model=sample.model,
            answer=sample.answer,
            finish_reason=sample.finish_reason,
            prompt_tokens=sample.prompt_tokens,
            completion_tokens=sample.completion_tokens,
            error=Failure(**sample.error) if sample.error else None,
            grades=sample.grades,
            verdict=sample.verdict,
        )
