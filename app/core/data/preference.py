"""`{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}`: the API's format for DPO."""

from dataclasses import replace
from typing import Any

from app.core.chat import Chat
from app.core.data import chats, messages
from app.core.data.report import Findings

KEYS = frozenset({"input", "preferred_output", "non_preferred_output"})
OUTPUTS = ("preferred_output", "non_preferred_output")


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    for key in row.keys() - KEYS:
        found.say("unknown_key", f"unknown key {key!r}; a row holds `input`, `preferred_output`, `non_preferred_output`", key)
    _check_input(row.get("input"), found)
    for key in OUTPUTS:
        check_output(row.get(key), found, key)
    if row.get("preferred_output") == row.get("non_preferred_output"):
        found.say("outputs_equal", "both answers are the same", "non_preferred_output")


def convert(row: dict[str, Any], line: int) -> Chat:
    """Of the conversation only the two answers count: what the assistant said before them is context."""
    asked = [replace(message, weight=0) for message in messages.converted(row["input"]["messages"])]
    preferred, rejected = (replace(messages.converted(row[key])[0], weight=1) for key in OUTPUTS)
    return Chat((*asked, preferred), line, tuple(row["input"].get("tools") or ()), rejected)


def _check_input(asked: Any, found: Findings) -> None:
    if not isinstance(asked, dict):
        found.say("field_missing", "`input` must be an object with `messages`", "input")
        return
    for key in asked.keys() - chats.KEYS:
        found.say("unknown_key", f"unknown key {key!r}; input holds `messages`, and perhaps `tools`", "input", key)
    chats.check_conversation(asked, found, "input")


def check_output(output: Any, found: Findings, key: str) -> None:
    """Say what is wrong with an answer that stands apart from its conversation."""
    if not isinstance(output, list) or len(output) != 1:
        found.say("output_invalid", f"{key} must be a list of one assistant message", key)
        return
    roles = messages.check_each(output, found, key)
    if roles and roles != ["assistant"]:
        found.say("output_invalid", f"{key} must be an assistant message", key, 0)
