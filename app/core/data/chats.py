"""`{"messages": […], "tools"?, "parallel_tool_calls"?}`: the API's own format for conversations."""

from typing import Any

from app.core.chat import Chat
from app.core.data import messages, tools
from app.core.data.place import Step
from app.core.data.report import Findings

KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    if not row.keys() <= KEYS:
        for key in row.keys() - KEYS:
            code, word = ("function_deprecated", "older") if key == "functions" else ("unknown_key", "unknown")
            found.say(code, f"{word} key {key!r}; a chat row holds `messages`, and perhaps `tools`", key)
    roles = check_conversation(row, found)
    if roles:
        messages.check_order(roles, found, "messages")
    if "assistant" in roles and not messages.has_answer(row["messages"]):
        found.say("nothing_to_train", "no assistant message has weight 1", "messages")


def check_conversation(holder: dict[str, Any], found: Findings, *at: Step, key: str = "messages") -> list[str]:
    """What is wrong with messages and tools, wherever they stand. Returns the roles of the messages, if all have one."""
    listed = holder.get(key)
    if not isinstance(listed, list) or not listed:
        found.say("messages_missing", f"`{key}` must be a list of at least one message", *at, key)
        return []
    before = found.problem_count
    names = tools.check(holder["tools"], found, *at, "tools") if holder.get("tools") is not None else set[str]()
    is_parallel = holder.get("parallel_tool_calls")
    if not isinstance(is_parallel, bool | None):
        found.say("tools_invalid", "parallel_tool_calls must be true or false", *at, "parallel_tool_calls")
    roles = messages.check_each(listed, found, *at, key)
    if "tool" in roles or (roles and any("tool_calls" in message for message in listed)):
        tools.check_answers(listed, found, *at, key)
        if found.problem_count == before:
            tools.check_use(listed, names, is_parallel=is_parallel is not False, found=found, at=(*at, key))
    return roles


def convert(row: dict[str, Any], line: int) -> Chat:
    return Chat(messages.converted(row["messages"]), line, tuple(row.get("tools") or ()))
