"""One line of a file to the JSON value it holds. Nearly all go the fast way; whatever it refuses, the exact way judges."""

import json
import re
from collections.abc import Iterator
from typing import Any

from jiter import from_json

from app.core.data.lines import MAX_LINE_BYTES
from app.core.data.place import Place

MAX_DEPTH = 32

_FIRST_LINE = 1
_BOM, _UTF16 = "\ufeff", (b"\xff\xfe", b"\xfe\xff")
_COLUMN = re.compile(r"column (\d+)$")


class NotARow(ValueError):
    """The line holds no value that can be judged further."""

    def __init__(self, code: str, message: str, column: int | None = None, place: Place = ()) -> None:
        super().__init__(message)
        self.code, self.column, self.place = code, column, place


def parse(line: bytes, number: int) -> Any:
    """The value of a line that is not blank. Raises NotARow."""
    if len(line) > MAX_LINE_BYTES:
        raise NotARow("line_too_long", f"the line is over {MAX_LINE_BYTES} bytes")
    try:
        return fast(line)
    except ValueError as error:
        try:
            return exact(line, number)
        except NotARow as refused:
            if refused.code == "duplicate_key":
                refused.column = _column_in(str(error), line)
            raise refused from None


def exact(line: bytes, number: int) -> Any:
    """What `parse` gives, slowly, and the words for what is wrong. Raises NotARow."""
    text = _text(line, number)
    if _is_too_deep(text):
        raise NotARow("too_deep", f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise NotARow("not_json", _explained(error, line, number), error.colno) from None
    except NotARow:
        raise
    except ValueError:
        raise NotARow("not_json", "not valid JSON: a number has too many digits") from None
    for place, found in strings_of(value):
        if not _is_whole(found):
            raise NotARow("lone_surrogate", "a text holds half of a surrogate pair", place=place)
    return value


def strings_of(value: Any) -> Iterator[tuple[Place, str]]:
    """Every text of a value with its place, keys among them."""
    waiting: list[tuple[Place, Any]] = [((), value)]
    while waiting:
        place, found = waiting.pop()
        if isinstance(found, str):
            yield place, found
        elif isinstance(found, dict):
            for key, inner in found.items():
                yield place, key
                waiting.append(((*place, key), inner))
        elif isinstance(found, list):
            waiting.extend(((*place, index), inner) for index, inner in enumerate(found))


def fast(line: bytes) -> Any:
    """Raises ValueError for all that is not plainly right, and for a few things that are: a byte order mark for one."""
    value = from_json(line, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys")
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and not is_within(value, MAX_DEPTH):
        raise ValueError("too deep")
    return value


def is_within(value: Any, levels: int) -> bool:
    """Whether no more than so many lists and objects stand in each other."""
    layer = [value]
    for _ in range(levels):
        inside = [inner for outer in layer for inner in (outer.values() if isinstance(outer, dict) else outer)]
        layer = [inner for inner in inside if isinstance(inner, dict | list)]
        if not layer:
            return True
    return False


def _text(line: bytes, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = error.start + 1
        what = "the file is UTF-16" if number == _FIRST_LINE and line.startswith(_UTF16) else f"byte {column} is not UTF-8"
        raise NotARow("not_utf8", what, column) from None
    return text.removeprefix(_BOM) if number == _FIRST_LINE else text


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict[str, Any]()
    for key, value in pairs:
        if key in made:
            raise NotARow("duplicate_key", f"the key {key!r} stands twice in one object")
        made[key] = value
    return made


def _constant(name: str) -> Any:
    raise NotARow("not_json", f"{name} is not JSON")


def _explained(error: json.JSONDecodeError, line: bytes, number: int) -> str:
    """The parser's words, and what such a line usually comes from."""
    said = f"not valid JSON: {error.msg}"
    if b"\x00" in line:
        return f"{said}; it holds NUL bytes, as UTF-16 does"
    if number == _FIRST_LINE and line.strip() in (b"{", b"["):
        return f"{said}; the file looks pretty-printed"
    if error.msg == "Extra data":
        return f"{said}; a second value stands on the line"
    return said


def _column_in(said: str, line: bytes) -> int | None:
    """The fast parser counts bytes; people and editors count characters."""
    found = _COLUMN.search(said)
    if found is None:
        return None
    before, behind = line[: int(found[1]) - 1].decode(), line[int(found[1]) - 1 :]
    return len(before) + len(behind) - len(behind.lstrip()) + 1


def _is_too_deep(text: str) -> bool:
    """Whether a text that may be no JSON is nested too deeply, so that no parser has to follow it down."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    is_string = is_escaped = False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif is_string:
            is_escaped = character == "\\"
            is_string = character != '"'
        elif character == '"':
            is_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif character in "]}":
            depth -= 1
    return False
