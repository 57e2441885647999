"""Scores of the graders that need no other model. Runs in a process with limits: see app.core.graders.process."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import jsonschema_rs
from pydantic import BaseModel, ConfigDict

from app.core import multiple_choice
from app.core.graders import formula, similarity, template
from app.core.graders.spec import (
    AnyGrader,
    JsonSchema,
    LocalGrader,
    Multi,
    MultipleChoice,
    Regex,
    StringCheck,
    TextSimilarity,
    compiled,
    singles,
)
from app.core.graders.template import NotInAnswer, Sample, Unfillable

PATTERN_BYTES = 2**20  # of a schema's compiled patterns

Flag = Literal[
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_server_error",
    "sample_parse_error",
    "other_error",
]


class Grade(BaseModel):
    """A score, or why there is none. An answer that is no JSON where one was named scores 0 and says so in `error`."""

    model_config = ConfigDict(frozen=True)

    score: float | None
    error: Flag | None = None
    message: str | None = None


class SchemaRefused(ValueError):
    """It is no JSON schema, or names another document."""


def grade(grader: LocalGrader, item: Mapping[str, Any], sample: Sample) -> Grade:
    """What this answer to this item scores."""
    try:
        return Grade(score=float(_score(grader, item, sample)))
    except NotInAnswer as error:
        return Grade(score=0.0, error="sample_parse_error", message=str(error))
    except Unfillable as error:
        return Grade(score=None, error="invalid_variable_error", message=str(error))


def combine(graders: list[AnyGrader], by_key: Mapping[str, Grade]) -> list[Grade]:
    """One grade a grader: a `multi` has that of its formula, and none if one of its graders has none."""

    def of(index: int, grader: AnyGrader) -> Grade:
        if isinstance(grader, Multi):
            return _of_formula(grader, {name: by_key[f"{index}.{name}"] for name in grader.graders})
        return by_key[str(index)]

    return [of(index, grader) for index, grader in enumerate(graders)]


def check(graders: list[AnyGrader]) -> None:
    """What only compiling shows. Raises SchemaRefused, which names the grader."""
    for _, grader in singles(graders):
        if isinstance(grader, JsonSchema):
            try:
                _validator(json.dumps(grader.json_schema))
            except Exception as error:  # whatever the library raises, ours is what was given to it
                why = str(error).partition("\n")[0][:200]
                raise SchemaRefused(f"the json_schema of {grader.name!r} cannot be used: {why}") from None


def _score(grader: LocalGrader, item: Mapping[str, Any], sample: Sample) -> float:
    def filled(text: str) -> str:
        return template.fill(text, item, sample)

    match grader:
        case StringCheck():
            return _compare(grader.operation, filled(grader.input), filled(grader.reference))
        case TextSimilarity():
            return similarity.METRICS[grader.evaluation_metric](filled(grader.input), filled(grader.reference))
        case JsonSchema():
            return _keeps_to(grader.json_schema, Sample(filled(grader.input)))
        case Regex():
            pattern, text = _pattern(grader.pattern, grader.ignore_case), filled(grader.input)
            return bool(pattern.fullmatch(text) if grader.full else pattern.search(text))
        case MultipleChoice():
            return multiple_choice.letter_in(sample.output_text) == filled(grader.reference).strip().upper()


def _compare(operation: str, text: str, reference: str) -> bool:
    match operation:
        case "eq":
            return text == reference
        case "ne":
            return text != reference
        case "like":
            return reference in text
        case _:
            return reference.casefold() in text.casefold()


def _keeps_to(schema: dict[str, Any], text: Sample) -> bool:
    try:
        return bool(_validator(json.dumps(schema)).is_valid(text.output_json))
    except NotInAnswer:
        return False


@cache
def _validator(schema: str) -> Any:
    """Offline, so that no reference leads to an address; patterns in linear time."""
    return jsonschema_rs.validator_for(
        json.loads(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions(PATTERN_BYTES, PATTERN_BYTES)
    )


_pattern = cache(lambda pattern, ignore_case: compiled(pattern, ignore_case=ignore_case))


def _of_formula(grader: Multi, grades: Mapping[str, Grade]) -> Grade:
    if failed := next((inner for inner in grades.values() if inner.score is None), None):
        return Grade(score=None, error=failed.error, message=failed.message)
    try:
        scores = {name: inner.score for name, inner in grades.items() if inner.score is not None}
        return Grade(score=formula.evaluate(grader.calculate_output, scores))
    except ValueError as error:
        return Grade(score=None, error="formula_parse_error", message=str(error))
