"""Functions a row offers, the assistant's calls of them, and the messages that answer."""

import json
import re
from typing import Any

from app.core.chat import ToolCall
from app.core.data.parse import NotARow, exact
from app.core.data.place import Step
from app.core.data.report import Findings

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})


def check(tools: Any, found: Findings, *at: Step) -> set[str]:
    """Say what is wrong with a row's `tools`. Returns the names they have."""
    if not isinstance(tools, list):
        found.say("tools_invalid", "`tools` must be a list", *at)
        return set()
    names = set[str]()
    for index, tool in enumerate(tools):
        name = _checked_tool(tool, found, *at, index)
        if name in names:
            found.say("tools_invalid", f"two tools have the name {name!r}", *at, index)
        if name is not None:
            names.add(name)
    return names


def check_calls(calls: Any, found: Findings, *at: Step) -> None:
    """Say what is wrong with the `tool_calls` of one message."""
    if not isinstance(calls, list):
        found.say("tool_calls_invalid", "`tool_calls` must be a list", *at)
        return
    ids = set[str]()
    for index, call in enumerate(calls):
        call_id = _checked_call(call, found, *at, index)
        if call_id in ids:
            found.say("tool_calls_invalid", f"two calls have the id {call_id!r}", *at, index, "id")
        if call_id is not None:
            ids.add(call_id)


def check_answers(messages: list[Any], found: Findings, *at: Step) -> None:
    """Every call is answered by the tool messages that follow it, or ends the row."""
    open_ids, opened_at = set[str](), 0
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if isinstance(call_id, str):
                if call_id not in open_ids:
                    found.say("tool_call_unknown", f"no open call has the id {call_id!r}", *at, index, "tool_call_id")
                open_ids.discard(call_id)
            continue
        if open_ids:
            found.say("tool_call_unanswered", f"the call {min(open_ids)!r} is not answered", *at, opened_at, "tool_calls")
        open_ids, opened_at = _ids_of(message), index


def check_use(messages: list[Any], names: set[str], *, is_parallel: bool, found: Findings, at: tuple[Step, ...]) -> None:
    """What checked calls do beside what the row says of its tools."""
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        if len(calls) > 1 and not is_parallel:
            found.say("parallel_calls", f"{len(calls)} calls at once", *at, index, "tool_calls")
        for number, call in enumerate(calls):
            if (name := call["function"]["name"]) not in names:
                found.say("tool_not_listed", f"`tools` lists no function {name!r}", *at, index, "tool_calls", number)


def converted(calls: list[dict[str, Any]]) -> tuple[ToolCall, ...]:
    """Checked calls as values."""
    return tuple(ToolCall(call["id"], call["function"]["name"], _arguments(call["function"]["arguments"])) for call in calls)


def _checked_tool(tool: Any, found: Findings, *at: Step) -> str | None:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        found.say("tools_invalid", "a tool must be {'type': 'function', 'function': {…}}", *at)
        return None
    function = tool["function"]
    for key in (*(tool.keys() - {"type", "function"}), *(function.keys() - _FUNCTION_KEYS)):
        found.say("unknown_key", f"a tool has no key {key!r}", *at)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        found.say("tools_invalid", "a function's name has 1 to 64 letters, digits, _ or -", *at, "function", "name")
        return None
    if not isinstance(function.get("description") or "", str):
        found.say("tools_invalid", "a function's description must be a string", *at, "function", "description")
    if not isinstance(function.get("parameters", {}), dict) or not _is_writable(function.get("parameters")):
        found.say("tools_invalid", "a function's parameters must be a JSON Schema: an object", *at, "function", "parameters")
    return name


def _checked_call(call: Any, found: Findings, *at: Step) -> str | None:
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(call.get("function"), dict):
        found.say("tool_calls_invalid", "a call must be {'id': …, 'type': 'function', 'function': {…}}", *at)
        return None
    function, call_id = call["function"], call.get("id")
    for key in (*(call.keys() - {"id", "type", "function", "index"}), *(function.keys() - {"name", "arguments"})):
        found.say("unknown_key", f"a tool call has no key {key!r}", *at)
    if not isinstance(function.get("name"), str) or not function["name"]:
        found.say("tool_calls_invalid", "a call needs the name of its function", *at, "function", "name")
    _check_arguments(function.get("arguments"), found, *at, "function", "arguments")
    if not isinstance(call_id, str) or not call_id:
        found.say("tool_calls_invalid", "a call needs an id", *at, "id")
        return None
    return call_id


def _check_arguments(arguments: Any, found: Findings, *at: Step) -> None:
    if isinstance(arguments, str):
        try:
            arguments = exact(arguments.encode("utf-8", "surrogatepass"), 0)
        except NotARow as refused:
            found.say("arguments_invalid", f"the text of the arguments: {refused}", *at)
            return
    if not isinstance(arguments, dict) or not _is_writable(arguments):
        found.say("arguments_invalid", "the arguments must be a JSON object", *at)


def _is_writable(value: Any) -> bool:
    """Whether it can be written as JSON again: 1e999 is read as infinity, and an escape may be half of a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def _arguments(arguments: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(arguments) if isinstance(arguments, str) else arguments
    return read


def _ids_of(message: dict[str, Any]) -> set[str]:
    calls = message.get("tool_calls")
    listed = calls if isinstance(calls, list) else []
    return {call["id"] for call in listed if isinstance(call, dict) and isinstance(call.get("id"), str)}
