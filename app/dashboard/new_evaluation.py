"""The form that makes an evaluation: its fields as the API's body. A grader's fields begin with `grader.KEY.`, for any key."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData

from app.core import data
from app.core.errors import BadRequest
from app.core.graders import template
from app.core.graders.similarity import METRICS
from app.core.graders.spec import OUTPUT, REFERENCE
from app.dashboard.forms import number
from app.evaluations.schemas import EvaluationCreate
from app.handlers import first_problem

GRADER = "grader."
KINDS = {
    "string_check": "text: equal, or contained",
    "text_similarity": "likeness to the reference",
    "json_schema": "JSON of a certain shape",
    "regex": "a pattern",
    "multiple_choice": "the letter of a choice",
    "score_model": "a score by a judge",
}
OPERATIONS = {"eq": "is", "ilike": "contains, in any case", "like": "contains", "ne": "is not"}
FIRST_NAMES = {"string_check": "exact", "text_similarity": "likeness", "json_schema": "shape", "multiple_choice": "letter"}
LIKENESSES = tuple(METRICS)
_FOUND = {
    data.CHAT: ("item.reference", "item.messages"),
    data.MULTIPLE_CHOICE: ("item.reference", "item.question", "item.choices"),
}


def placeholders(held: str, row: Mapping[str, Any] | None) -> list[str]:
    """What graders, and the question about an item, can name of a file's rows, as its first row has them."""
    if held != data.ITEM:
        return [f"{{{{{name}}}}}" for name in _FOUND.get(held, ())]
    item = (row or {}).get("item")
    named = [f"{{{{item.{name}}}}}" for name in item] if isinstance(item, dict) else []
    return [placeholder for placeholder in named if _is_usable(placeholder)]


def _is_usable(placeholder: str) -> bool:
    """A field may be called what no placeholder can say."""
    try:
        template.check(placeholder)
    except ValueError:
        return False
    return True


def is_begun(form: FormData) -> bool:
    """Whether there is enough of it that what is wrong is worth telling: a file, and something that tells answers apart."""
    return bool(form.get("file")) and any((name == "judge" and text) or name.startswith(GRADER) for name, text in form.items())


def asked(form: FormData) -> EvaluationCreate:
    """The body that this form stands for. Raises BadRequest, naming the field."""
    said = {name: text.strip() for name, text in form.items() if isinstance(text, str) and text.strip()}
    models = dict.fromkeys([*_texts(form, "first"), *_texts(form, "models")])  # the first is what the others are compared with
    body: dict[str, Any] = {name: said[name] for name in ("name", "file") if name in said}
    body |= {"models": [model for model in models if model], "graders": _graders(said), "sampling": _sampling(said)}
    if "question" in said:
        system = [{"role": "system", "content": said["system"]}] if "system" in said else []
        body["input"] = [*system, {"role": "user", "content": said["question"]}]
    if "judge" in said:
        body["pairwise"] = {"judge": said["judge"]} | ({"criteria": said["criteria"]} if "criteria" in said else {})
    try:
        return EvaluationCreate.model_validate(body)
    except ValidationError as error:
        raise first_problem(error.errors()) from None


def _texts(form: FormData, name: str) -> Sequence[str]:
    return [text for text in form.getlist(name) if isinstance(text, str)]


def _sampling(said: Mapping[str, str]) -> dict[str, Any]:
    return {name: number(said[name]) for name in ("max_tokens", "temperature", "seed") if name in said}


def _graders(said: Mapping[str, str]) -> list[dict[str, Any]]:
    by_key = dict[str, dict[str, str]]()
    for name, text in said.items():
        if name.startswith(GRADER):
            key, _, field = name.removeprefix(GRADER).partition(".")
            by_key.setdefault(key, {})[field] = text
    return [_grader(place, fields) for place, fields in enumerate(by_key.values())]


def _grader(place: int, fields: Mapping[str, str]) -> dict[str, Any]:
    kind = fields.get("type")
    made: dict[str, Any] = {"type": kind, "name": fields.get("name", f"{kind} {place + 1}")}
    reference = {"reference": fields.get("reference", REFERENCE)}
    match kind:
        case "string_check":
            return made | {"input": OUTPUT, "operation": fields.get("operation", "eq")} | reference
        case "text_similarity":
            return made | {"input": OUTPUT, "evaluation_metric": fields.get("metric", "")} | reference
        case "json_schema":
            return made | {"json_schema": _json(fields.get("schema", ""), f"graders.{place}.json_schema")}
        case "regex":
            return made | {"pattern": fields.get("pattern", ""), "full": "full" in fields, "ignore_case": "ignore_case" in fields}
        case "score_model":
            ends = [number(fields.get("lowest", "0")), number(fields.get("highest", "1"))]
            message = {"role": "user", "content": fields.get("instructions", "")}
            return made | {"model": fields.get("judge", ""), "input": [message], "range": ends}
        case _:
            return made | reference


def _json(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{param} must be JSON: {error}", param=param) from None
