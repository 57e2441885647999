"""Where in a row something stands: as a JSON path for people, and as a column for editors."""

import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]  # exported, and missing in its stubs

Step = str | int
Place = tuple[Step, ...]

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(strict=False)


def path_of(place: Place) -> str:
    """`$.messages[2].content`; keys that are no words stand in quotes."""
    return "$" + "".join(_step(step) for step in place)


def column_of(text: str, place: Place) -> int | None:
    """The column, from 1, of the value at this place of valid JSON; of the nearest thing around it if it is not there."""
    try:
        at = _after_space(text, 0)
        for step in place:
            found = _child(text, at, step)
            if found is None:
                break
            at = found
    except (ValueError, IndexError):
        return None
    return at + 1


def _step(step: Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if _WORD.fullmatch(step) else f"[{json.dumps(step, ensure_ascii=False)}]"


def _child(text: str, at: int, step: Step) -> int | None:
    if text[at] not in "[{":
        return None
    is_object, index = text[at] == "{", 0
    at = _after_space(text, at + 1)
    while text[at] not in "]}":
        name: Step = index
        if is_object:
            name, at = scanstring(text, at + 1)
            at = _after_space(text, _after_space(text, at) + 1)
        if name == step:
            return at
        at = _after_space(text, _DECODER.raw_decode(text, at)[1])
        if text[at] == ",":
            at = _after_space(text, at + 1)
        index += 1
    return None


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing at all too
    return found.end()
