"""`{{item.question}}` and `{{sample.output_text}}` in a grader's texts: names are replaced by values, and nothing is computed."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

MAX_FILLED = 256 * 1024  # characters

_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
_PATH = re.compile(r"(item|sample)((?:\.[\w-]+|\[\d{1,6}\])*)")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]")
_OF_SAMPLE = ("output_text", "output_json")


class Unfillable(ValueError):
    """A placeholder has no value for this row."""


class NotInAnswer(Unfillable):
    """`sample.output_json` of an answer that is no JSON, or lacks what is named: the answer's fault, not the row's."""


@dataclass(frozen=True)
class Sample:
    """What a model has answered."""

    output_text: str

    @cached_property
    def output_json(self) -> Any:
        """Raises NotInAnswer."""
        try:
            return json.loads(self.output_text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise NotInAnswer("the answer is no JSON") from None


def check(template: str) -> str:
    """The template itself. Raises ValueError for a placeholder that could never be filled."""
    for written in _PLACEHOLDER.findall(template):
        found = _PATH.fullmatch(written.strip())
        if found is None:
            raise ValueError(
                f"must hold placeholders like {{{{item.name}}}} or {{{{sample.output_text}}}}, not {{{{{written[:64]}}}}}"
            )
        steps = list(_steps(found[2]))
        if found[1] == "sample" and (not steps or steps[0] not in _OF_SAMPLE):
            raise ValueError(f"must name {' or '.join(f'sample.{name}' for name in _OF_SAMPLE)}, not {written.strip()[:64]}")
        if found[1] == "item" and not steps:
            raise ValueError("must name a field of the item, as in {{item.reference}}")
    return template


def fill(template: str, item: Mapping[str, Any], sample: Sample | None = None) -> str:
    """The text with every placeholder replaced: strings as they are, anything else as JSON. Raises Unfillable."""
    length = 0

    def value(found: re.Match[str]) -> str:
        nonlocal length
        text = _written(_value(found[1].strip(), item, sample))
        length += len(text)
        if length > MAX_FILLED:
            raise Unfillable(f"the filled text is longer than {MAX_FILLED} characters")
        return text

    return _PLACEHOLDER.sub(value, template)


def _value(path: str, item: Mapping[str, Any], sample: Sample | None) -> Any:
    found = _PATH.fullmatch(path)
    if found is None:
        raise Unfillable(f"{path} is no name of a value")
    steps = _steps(found[2])
    value: Any = item
    if found[1] == "sample":
        if sample is None:
            raise Unfillable("there is no sample yet")
        value = sample.output_text if next(steps) == "output_text" else sample.output_json
    for step in steps:
        value = _inside(value, step, path)
    return value


def _inside(value: Any, step: str, path: str) -> Any:
    if isinstance(value, Mapping) and step in value:
        return value[step]
    if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
        return value[int(step)]
    kind = NotInAnswer if path.startswith("sample") else Unfillable
    raise kind(f"{path} has no value: there is no {step!r}")


def _steps(written: str) -> Iterator[str]:
    for found in _STEP.finditer(written):
        yield found[1] or found[2]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
