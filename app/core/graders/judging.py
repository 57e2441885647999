"""What is asked of a judge, and how its words are read."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from app.core.graders.spec import ScoreModel
from app.core.graders.template import Sample

Chat = list[dict[str, str]]
Verdict = Literal["first", "second", "tie"]

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_OBJECT = re.compile(r"\{[^{}]*\}")
_LETTER = re.compile(r"\W*(A|B|TIE)\W*", re.IGNORECASE)
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "TIE": "tie"}
_COMPARED = """\
You compare two answers to the same request. {criteria}

The request:
{request}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one of these and nothing else: {{"result": "A"}} {{"result": "B"}} {{"result": "tie"}}"""
CRITERIA = "Prefer the one that is correct, complete and to the point."


class Unreadable(ValueError):
    """The judge's answer holds no result, or one outside the range. The message quotes nothing of it."""


def score_messages(grader: ScoreModel, item: Mapping[str, Any], sample: Sample) -> Chat:
    """The grader's messages, filled in, and at their end how to answer. Raises Unfillable."""
    low, high = grader.range
    how = f'Reply with one JSON object and nothing else: {{"result": NUMBER}}, where NUMBER is from {low:g} to {high:g}.'
    filled = [message.filled(item, sample) for message in grader.input]
    if filled[-1]["role"] != "user":
        return [*filled, {"role": "user", "content": how}]
    return [*filled[:-1], {"role": "user", "content": f"{filled[-1]['content']}\n\n{how}"}]


def score_in(text: str, grader: ScoreModel) -> float:
    """The number in `{"result": …}`, or the whole answer if that is a number. Raises Unreadable."""
    for result in _results(text):
        if isinstance(result, int | float) and not isinstance(result, bool):
            return _within(float(result), grader.range)
    if _NUMBER.fullmatch(text.strip()):
        return _within(float(text), grader.range)
    raise Unreadable("the judge's answer holds no result")


def compare_messages(request: Sequence[Mapping[str, str]], first: str, second: str, criteria: str | None) -> Chat:
    """Two answers side by side, by what stands first."""
    told = "\n\n".join(f"[{message['role']}] {message['content']}" for message in request)
    content = _COMPARED.format(criteria=criteria or CRITERIA, request=told, first=first, second=second)
    return [{"role": "user", "content": content}]


def verdict_in(text: str) -> Verdict:
    """`{"result": "A"}`, or the whole answer if it is A, B or tie. Raises Unreadable."""
    for said in (*_results(text), text):
        if isinstance(said, str) and (found := _LETTER.fullmatch(said)):
            return _VERDICTS[found[1].upper()]
    raise Unreadable("the judge's answer holds no result")


def _results(text: str) -> Iterator[Any]:
    for found in _OBJECT.findall(text):
        try:
            said = json.loads(found)
        except ValueError:
            continue
        if "result" in said:
            yield said["result"]


def _within(number: float, ends: tuple[float, float]) -> float:
    if not ends[0] <= number <= ends[1]:
        raise Unreadable(f"the judge's result is not from {ends[0]:g} to {ends[1]:g}")
    return number
