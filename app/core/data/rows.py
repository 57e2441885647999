"""One line of a file: what it holds, of which format, and all that is to be said about it."""

import re
from collections.abc import Sequence
from typing import Any

from app.core.chat import Chat
from app.core.data import formats
from app.core.data.evaluation import EvaluationRow
from app.core.data.formats import AnyFormat
from app.core.data.parse import NotARow, parse, strings_of
from app.core.data.report import Findings, Problem

LONG_ROW_BYTES = 32 * 1024
# what could end a turn or begin another in some family's template; each base refuses its own when it renders
_SPECIAL = (
    r"<\|(?:im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|eot_id|eom_id|start_header_id|end_header_id|python_tag)\|>"
    r"|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]"
)
_IN_TEXT, _IN_LINE = re.compile(_SPECIAL), re.compile(_SPECIAL.replace("/", r"\\?/").encode())  # JSON may escape a slash
_ESCAPED = re.compile(rb"\\u00(?:00|[357])")  # NUL, and what those tokens are made of


class RowError(ValueError):
    """A row that cannot be used."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.told())
        self.problem = problem


def check(line: bytes, number: int, found: Findings, among: Sequence[AnyFormat]) -> tuple[AnyFormat, dict[str, Any]] | None:
    """Say all there is to say of one row. Returns what it holds, unless it belongs to none of these formats."""
    found.begin(number, line)
    try:
        row = parse(line, number)
    except NotARow as refused:
        found.say(refused.code, str(refused), *refused.place, column=refused.column)
        return None
    if _has_oddity(line):
        _check_strings(row, found)
    if len(line) > LONG_ROW_BYTES:
        found.say("row_long", f"the row has {len(line)} bytes")
    if not isinstance(row, dict):
        hint = "; the file holds one list: write each element on a line of its own" if isinstance(row, list) else ""
        found.say("row_not_object", f"a row must be a JSON object{hint}")
        return None
    known = formats.find(row, among)
    if known is None:
        keys = ", ".join(map(repr, sorted(row))) or "none"
        found.say("format_unknown", f"no format has the keys of this row: {keys}")
        return None
    known.check(row, found)
    return known, row


def to_chat(line: bytes, number: int) -> Chat:
    """The chat of a line of a valid file. Raises RowError."""
    found = Findings()
    checked = check(line, number, found, formats.FORMATS)
    if checked and not found.problem_count:
        known, row = checked
        return known.convert(row, number)
    raise RowError(found.problems()[0])


def to_evaluation_row(line: bytes, number: int) -> EvaluationRow:
    """The question of a line of a valid evaluation file. Raises RowError."""
    found = Findings()
    checked = check(line, number, found, formats.EVALUATED)
    if checked and not found.problem_count:
        known, row = checked
        return known.convert(row, number)
    raise RowError(found.problems()[0])


def _has_oddity(line: bytes) -> bool:
    """Whether a text of the row may hold what none should: told from the line, since walking through every row takes too long."""
    if b"\\u00" in line and _ESCAPED.search(line):
        return True
    return (b"<" in line or b"INST]" in line) and _IN_LINE.search(line) is not None


def _check_strings(row: Any, found: Findings) -> None:
    """What no text should hold, wherever it stands."""
    for place, text in strings_of(row):
        if "\x00" in text:
            found.say("nul_character", "a text holds a NUL character", *place)
        if special := _IN_TEXT.search(text):
            found.say("special_token", f"a text holds {special[0]}", *place)
