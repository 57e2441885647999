"""Chat files: one conversation a line. Every problem is named by line and path, with a stable code and what to do."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MAX_LINE_BYTES = 1024 * 1024
MAX_DEPTH = 32
MAX_LISTED = 100
MAX_TOLD = 300  # characters of a message or path
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn as context without training on it."""

    role: str
    content: str
    weight: Literal[0, 1] = 1


@dataclass(frozen=True)
class Chat:
    """One row of a training file."""

    messages: tuple[Message, ...]
    line: int


class Problem(BaseModel):
    """What is wrong with a row. `line` counts from 1; `path` is a JSON path such as `$.messages[2].content`."""

    model_config = ConfigDict(frozen=True)

    line: int
    code: str
    message: str
    path: str = "$"
    column: int | None = None


class Report(BaseModel):
    """The outcome of reading a whole file: at most 100 problems are listed, all are counted."""

    model_config = ConfigDict(frozen=True)

    format: str = "chat"
    rows: int
    problem_count: int
    problems: tuple[Problem, ...] = ()

    @property
    def is_valid(self) -> bool:
        return self.problem_count == 0

    def summary(self) -> str:
        """One line for people: the first problem, and how many more there are."""
        if self.is_valid:
            return f"{self.rows} chats"
        first = self.problems[0]
        more = f" ({self.problem_count - 1} more)" if self.problem_count > 1 else ""
        return f"line {first.line}, {first.path}: {first.message}{more}"


class RowError(ValueError):
    """A row that cannot be used."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def validate(lines: Iterable[bytes]) -> Report:
    """Read every line and report. Never raises for what a file may hold; an empty file is a problem of line 1."""
    rows, count, listed = 0, 0, list[Problem]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rows += 1
        try:
            parse_row(line, number)
        except RowError as error:
            count += 1
            if len(listed) < MAX_LISTED:
                listed.append(error.problem)
    if rows == 0:
        empty = Problem(line=1, code="file_empty", message="the file holds no chats; write one JSON object per line")
        return Report(rows=0, problem_count=1, problems=(empty,))
    return Report(rows=rows, problem_count=count, problems=tuple(listed))


def read(lines: Iterable[bytes]) -> Iterator[Chat]:
    """The chats of a valid file. Raises RowError at the first bad row."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_row(line, number)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines of a stream, split on \n only: JSON strings may hold the other line separators of Unicode.

    A line over the limit is cut there, so that a file without line ends cannot fill the memory; `parse_row` refuses it.
    """
    rest = b""
    is_skipping = False
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if not is_skipping:
                yield line
            is_skipping = False
        if len(rest) > MAX_LINE_BYTES:
            if not is_skipping:
                yield rest[: MAX_LINE_BYTES + 1]
            is_skipping, rest = True, b""
    if rest and not is_skipping:
        yield rest


def parse_row(line: bytes, number: int) -> Chat:
    """The chat of one line. Raises RowError."""
    return _Row(number).parse(line)


class _Row:
    """Knows its line number, so that every refusal can name it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def parse(self, line: bytes) -> Chat:
        row = self._json(self._text(line))
        if not isinstance(row, dict):
            raise self._error("row_not_object", "a row must be a JSON object with a list `messages`")
        if unknown := row.keys() - {"messages", "tools", "parallel_tool_calls"}:
            raise self._error("unknown_key", f"unknown key {min(unknown)!r}; a chat row holds `messages`", f"$.{min(unknown)}")
        if row.get("tools"):
            raise self._error("tools_unsupported", "rows with tools cannot be trained on; remove `tools`", "$.tools")
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise self._error("messages_missing", "`messages` must be a list of at least one message", "$.messages")
        chat = Chat(tuple(self._message(raw, f"$.messages[{i}]") for i, raw in enumerate(messages)), self._number)
        if not any(message.role == "assistant" and message.weight for message in chat.messages):
            raise self._error("nothing_to_train", "no assistant message with weight 1: there is nothing to learn", "$.messages")
        return chat

    def _text(self, line: bytes) -> str:
        if len(line) > MAX_LINE_BYTES:
            raise self._error("line_too_long", f"the line is over {MAX_LINE_BYTES} bytes; split the conversation")
        try:
            text = line.decode("utf-8").removeprefix("\ufeff" if self._number == 1 else "")
        except UnicodeDecodeError as error:
            column = error.start + 1
            raise self._error("not_utf8", f"byte {column} is not UTF-8; save the file as UTF-8", column=column) from None
        if _depth(text) > MAX_DEPTH:
            raise self._error("too_deep", f"nested deeper than {MAX_DEPTH} levels")
        return text

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=self._object, parse_constant=self._constant)
        except json.JSONDecodeError as error:
            raise self._error("not_json", f"not valid JSON: {error.msg}", column=error.colno) from None
        except ValueError as error:
            if isinstance(error, RowError):
                raise
            raise self._error("not_json", "not valid JSON: a number has too many digits") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise self._error("duplicate_key", f"the key {twice!r} stands twice in one object; keep one")
        return made

    def _constant(self, name: str) -> Any:
        raise self._error("not_json", f"{name} is not JSON")

    def _message(self, raw: Any, path: str) -> Message:
        if not isinstance(raw, dict):
            raise self._error("message_not_object", "a message must be an object with `role` and `content`", path)
        role = raw.get("role")
        if role not in ROLES:
            raise self._error("role_unknown", f"role must be one of {', '.join(ROLES)}, not {role!r}", f"{path}.role")
        if unknown := raw.keys() - {"role", "content", "weight", "name"}:
            raise self._error("unknown_key", f"unknown key {min(unknown)!r} in a message", f"{path}.{min(unknown)}")
        weight = raw.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise self._error("weight_invalid", "weight must be 0 or 1", f"{path}.weight")
        if "weight" in raw and role != "assistant":
            raise self._error("weight_misplaced", "only assistant messages may have a weight", f"{path}.weight")
        content = self._content(raw.get("content"), f"{path}.content")
        if role == "assistant" and weight and not content:
            raise self._error("content_empty", "an assistant message to train on must not be empty", f"{path}.content")
        return Message("system" if role == "developer" else role, content, 1 if weight else 0)

    def _content(self, content: Any, path: str) -> str:
        if isinstance(content, list):
            parts = (self._part(part, f"{path}[{i}]") for i, part in enumerate(content))
            return "".join(parts)
        if not isinstance(content, str):
            raise self._error("content_not_text", "content must be a string or a list of text parts", path)
        if "\x00" in content:
            raise self._error("nul_character", "content holds a NUL character; remove it", path)
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise self._error("lone_surrogate", "content holds half of a surrogate pair; write the whole character", path)
        return content

    def _part(self, part: Any, path: str) -> str:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise self._error("part_unsupported", "only text parts are supported: {'type': 'text', 'text': …}", path)
        return self._content(part.get("text") if isinstance(part.get("text"), str) else None, f"{path}.text")

    def _error(self, code: str, message: str, path: str = "$", column: int | None = None) -> RowError:
        problem = Problem(line=self._number, code=code, message=_shown(message), path=_shown(path), column=column)
        return RowError(problem)


def _shown(text: str) -> str:
    """What of a customer's own words can be stored and read: no control character, no half of a surrogate pair, no page."""
    kept = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
    return kept if len(kept) <= MAX_TOLD else kept[:MAX_TOLD] + "…"


def _depth(text: str) -> int:
    """An upper bound of the nesting: brackets are counted wherever they stand, and looked at closely only if many."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
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
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
