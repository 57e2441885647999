"""Graders as a request describes them: the types of the OpenAI API that are offered, and three of ours.

Whatever an error says begins with "must": the handler puts the parameter's name before it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import re2
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
)

from app.core.data.parse import MAX_DEPTH, is_within, strings_of
from app.core.graders import formula, similarity, template

MAX_TEMPLATE, MAX_PATTERN, MAX_JSON_BYTES = 64 * 1024, 4096, 256 * 1024
MAX_GRADERS, MAX_MESSAGES = 16, 32
PATTERN_MEMORY_BYTES = 8 * 2**20  # of RE2: a pattern that needs more is refused

OUTPUT = "{{sample.output_text}}"
REFERENCE = "{{item.reference}}"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """What can be stored and handed on: of bounded depth and size, without NaN, NUL and halves of characters."""
    if not is_within(value, MAX_DEPTH):
        raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise ValueError("must hold valid unicode only") from None
    except ValueError:
        raise ValueError("must hold finite numbers only") from None
    if size > MAX_JSON_BYTES:
        raise ValueError(f"must have at most {MAX_JSON_BYTES} bytes as JSON")
    if any("\x00" in text for _, text in strings_of(value)):
        raise ValueError("must not hold a NUL character")
    return value


def _text(content: Any) -> Any:
    """The SDK's text blocks as the text they hold. Images and sound are refused."""
    blocks = content if isinstance(content, list) else [content]
    texts = [block.get("text") if isinstance(block, dict) else block for block in blocks]
    kinds = {block.get("type") for block in blocks if isinstance(block, dict)}
    if not kinds <= {"input_text", "output_text", "text"} or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or text blocks: {'type': 'input_text', 'text': …}")
    return "".join(map(str, texts))


Json = Annotated[dict[str, Any], AfterValidator(_plain)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f]+$")]
Template = Annotated[str, StringConstraints(max_length=MAX_TEMPLATE), AfterValidator(template.check)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TemplateMessage(_Strict):
    """A message with placeholders."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Template, BeforeValidator(_text)]
    type: Literal["message"] | None = None

    def filled(self, item: Mapping[str, Any], sample: template.Sample | None = None) -> dict[str, str]:
        """As the chat API takes it. Raises Unfillable."""
        return {"role": self.role, "content": template.fill(self.content, item, sample)}


Messages = Annotated[list[TemplateMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class StringCheck(_Strict):
    """1 if `input` equals the reference (`eq`), does not (`ne`), contains it (`like`), also in other case (`ilike`); else 0."""

    type: Literal["string_check"]
    name: Name
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(_Strict):
    """From 0 to 1 by one of the measures of docs/evaluations.md."""

    type: Literal["text_similarity"]
    name: Name
    input: Template
    reference: Template
    evaluation_metric: str

    @field_validator("evaluation_metric")
    @classmethod
    def _is_offered(cls, metric: str) -> str:
        if metric in similarity.METRICS:
            return metric
        why = f": {similarity.NOT_OFFERED[metric]}" if metric in similarity.NOT_OFFERED else ""
        raise ValueError(f"must be one of {', '.join(similarity.METRICS)}; {metric[:64]!r} is not offered{why}")


class JsonSchema(_Strict):
    """1 if `input` is JSON that keeps to the schema, else 0. References within the schema are followed, no others."""

    type: Literal["json_schema"]
    name: Name
    input: Template = OUTPUT
    json_schema: Json


class Regex(_Strict):
    """1 if the pattern (RE2's syntax) is found in `input`, or with `full` is all of it; else 0."""

    type: Literal["regex"]
    name: Name
    input: Template = OUTPUT
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN)]
    full: bool = False
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            compiled(pattern)
        except re2.error as error:
            said = error.args[0]
            why = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
            raise ValueError(f"must be a regular expression of RE2: {why[:200]}") from None
        return pattern


class MultipleChoice(_Strict):
    """1 if the letter that the answer names is the reference's, else 0: app.core.multiple_choice reads it."""

    type: Literal["multiple_choice"]
    name: Name
    reference: Template = REFERENCE


class SamplingParams(_Strict):
    """How a judge answers."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_completions_tokens: Annotated[int, Field(ge=1, le=16_384)] | None = None


class ScoreModel(_Strict):
    """The number that a judge gives, within `range`: one of the operator's judges, or a model of the caller's."""

    type: Literal["score_model"]
    name: Name
    input: Messages
    model: ModelName
    range: tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]] = (0.0, 1.0)
    sampling_params: SamplingParams = SamplingParams()

    @field_validator("range")
    @classmethod
    def _rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not ends[0] < ends[1]:
            raise ValueError("must be two numbers, the lower one first")
        return ends


LOCAL = (StringCheck, TextSimilarity, JsonSchema, Regex, MultipleChoice)
_NOT_OFFERED = {"python": ": this server runs no programs", "label_model": ": use score_model"}


def _type_of(grader: Any) -> Any:
    """In brackets, as the handler knows the branch of a union, which it leaves out of the parameter's name."""
    return f"literal[{grader.get('type') if isinstance(grader, dict) else getattr(grader, 'type', None)}]"


def _require_type(*offered: str) -> BeforeValidator:
    def check(grader: Any) -> Any:
        kind = grader.get("type") if isinstance(grader, dict) else getattr(grader, "type", None)
        if kind is None:
            raise ValueError(f"must be an object with a type: {', '.join(offered)}")
        if kind not in offered:
            why = _NOT_OFFERED.get(str(kind), "")
            raise ValueError(f"must be of a type that is offered ({', '.join(offered)}); {str(kind)[:64]!r} is not{why}")
        return grader

    return BeforeValidator(check)


LocalGrader = StringCheck | TextSimilarity | JsonSchema | Regex | MultipleChoice
_SINGLE_TYPES = ("string_check", "text_similarity", "json_schema", "regex", "multiple_choice", "score_model")
_Single = (
    Annotated[StringCheck, Tag("literal[string_check]")]
    | Annotated[TextSimilarity, Tag("literal[text_similarity]")]
    | Annotated[JsonSchema, Tag("literal[json_schema]")]
    | Annotated[Regex, Tag("literal[regex]")]
    | Annotated[MultipleChoice, Tag("literal[multiple_choice]")]
    | Annotated[ScoreModel, Tag("literal[score_model]")]
)
SingleGrader = Annotated[_Single, Discriminator(_type_of), _require_type(*_SINGLE_TYPES)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]


class Multi(_Strict):
    """A formula over the scores of several graders, by their keys: `0.8 * exact + 0.2 * close`."""

    type: Literal["multi"]
    name: Name
    graders: Annotated[dict[Variable, SingleGrader], Field(min_length=1, max_length=MAX_GRADERS)]
    calculate_output: str

    @field_validator("calculate_output")
    @classmethod
    def _is_formula(cls, written: str, info: ValidationInfo) -> str:
        formula.check(written, info.data.get("graders", {}).keys())
        return written


Grader = Annotated[
    _Single | Annotated[Multi, Tag("literal[multi]")], Discriminator(_type_of), _require_type(*_SINGLE_TYPES, "multi")
]
AnyGrader = LocalGrader | ScoreModel | Multi


def compiled(pattern: str, *, ignore_case: bool = False) -> Any:
    """RE2 takes time in proportion to the text, whatever the pattern. Raises re2.error."""
    options = re2.Options()
    options.max_mem, options.log_errors, options.case_sensitive = PATTERN_MEMORY_BYTES, False, not ignore_case
    return re2.compile(pattern, options)


def singles(graders: list[AnyGrader]) -> Iterator[tuple[str, LocalGrader | ScoreModel]]:
    """Every grader that gives a score by itself, under a key that no other has."""
    for index, grader in enumerate(graders):
        if isinstance(grader, Multi):
            yield from ((f"{index}.{name}", inner) for name, inner in grader.graders.items())
        else:
            yield str(index), grader
