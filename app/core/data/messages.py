"""Messages as the chat API writes them: what each must hold, and in what order they make sense."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from app.core.chat import Message
from app.core.data import tools
from app.core.data.place import Step
from app.core.data.report import Findings

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_NAME = 64

_EVERY = frozenset({"role", "content", "name"})
_OF_ROLE = {
    "weight": ("assistant", "weight_misplaced"),
    "tool_calls": ("assistant", "key_misplaced"),
    "tool_call_id": ("tool", "key_misplaced"),
}
_ABSENT = frozenset({"refusal", "audio", "annotations", "function_call"})  # null in the API's own answers


def check_each(messages: list[Any], found: Findings, *at: Step) -> list[str]:
    """Say what is wrong with each message. Returns their roles, or nothing if one has none."""
    roles = [_check(message, found, *at, index) for index, message in enumerate(messages)]
    return [] if None in roles else [role for role in roles if role]


def check_order(roles: Sequence[str], found: Findings, *at: Step) -> None:
    """What most chat templates, or the purpose of training, do not expect. Once a row each."""
    if "assistant" not in roles:
        found.say("assistant_missing", "no message is the assistant's", *at)
        return
    spoken = [(index, role) for index, role in enumerate(roles) if role not in ("system", "developer")]
    if spoken[0][1] == "assistant":
        found.say("starts_with_assistant", "the first turn is the assistant's", *at, spoken[0][0])
    if spoken[-1][1] != "assistant":
        found.say("last_not_assistant", f"the last message has role {spoken[-1][1]}", *at, spoken[-1][0])
    for (_, before), (index, role) in pairwise(spoken):
        if role == before and role != "tool":
            found.say("same_role_twice", f"two messages of role {role} follow each other", *at, index)
            break


def has_answer(messages: list[dict[str, Any]]) -> bool:
    """Whether anything is to be learnt from checked messages."""
    return any(message["role"] == "assistant" and _is_trained(message) for message in messages)


def converted(messages: list[dict[str, Any]]) -> tuple[Message, ...]:
    """Checked messages as values."""
    return tuple(_converted(message) for message in messages)


def text_of(content: Any) -> str:
    """Checked content as one text: parts follow each other as they are."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _check(message: Any, found: Findings, *at: Step) -> str | None:
    if not isinstance(message, dict):
        found.say("message_not_object", "a message must be an object", *at)
        return None
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        hint = "; the older role `function` is `tool` today" if role == "function" else ""
        found.say("role_unknown", f"role must be one of {', '.join(ROLES)}, not {role!r}{hint}", *at, "role")
        return None
    if len(message) == 2 and isinstance(content, str) and content and not content.isspace() and role != "tool":
        return role  # nearly all are so
    if len(message) > 2 or "content" not in message or role == "tool":
        _check_keys(message, role, found, *at)
    text = _checked_content(content, bool(message.get("tool_calls")), found, *at, "content")
    if text is not None and (not text or text.isspace()):
        _check_empty(message, role, found, *at, "content")
    return role


def _check_keys(message: dict[str, Any], role: str, found: Findings, *at: Step) -> None:
    for key, value in message.items():
        if key in _EVERY:
            continue
        if key in _OF_ROLE:
            owner, code = _OF_ROLE[key]
            if role != owner and value not in (None, []):
                found.say(code, f"a message of role {role} cannot have {key}", *at, key)
        elif key not in _ABSENT:
            found.say("unknown_key", f"a message has no key {key!r}", *at, key)
        elif value:
            code = "function_deprecated" if key == "function_call" else "unknown_key"
            found.say(code, f"{key} is not trained on", *at, key)
    if role == "assistant":
        _check_weight(message.get("weight"), found, *at, "weight")
        if message.get("tool_calls") not in (None, []):
            tools.check_calls(message["tool_calls"], found, *at, "tool_calls")
    elif role == "tool" and not isinstance(message.get("tool_call_id"), str):
        found.say("field_missing", "a tool message needs the tool_call_id of the call it answers", *at, "tool_call_id")
    if message.get("name") is not None:
        _check_name(message["name"], role, found, *at, "name")


def _check_weight(weight: Any, found: Findings, *at: Step) -> None:
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        found.say("weight_invalid", f"weight must be 0 or 1, not {weight!r}", *at)


def _check_name(name: Any, role: str, found: Findings, *at: Step) -> None:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        found.say("name_invalid", f"name must be a string of at most {MAX_NAME} characters", *at)
    elif role != "tool":  # there it is the function's, which the call has named
        found.say("name_ignored", f"the name {name!r} is not shown to the base", *at)


def _checked_content(content: Any, has_calls: bool, found: Findings, *at: Step) -> str | None:
    """The text, if it is one."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [_is_text_part(part, found, *at, index) for index, part in enumerate(content)]
        return text_of(content) if all(parts) else None
    if content is None and has_calls:
        return ""
    found.say("content_not_text", "content must be a string or a list of text parts", *at)
    return None


def _is_text_part(part: Any, found: Findings, *at: Step) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = f"a part of type {part.get('type')!r}" if isinstance(part, dict) else "this"
        found.say("part_unsupported", f"{kind} is no text part: {{'type': 'text', 'text': …}}", *at)
        return False
    if not isinstance(part.get("text"), str):
        found.say("content_not_text", "the text of a part must be a string", *at, "text")
        return False
    return True


def _check_empty(message: dict[str, Any], role: str, found: Findings, *at: Step) -> None:
    if role == "assistant" and not message.get("tool_calls") and _is_trained(message):
        found.say("content_empty", "an assistant message to train on must not be empty", *at)
    elif role == "user":
        found.say("user_empty", "the user says nothing", *at)
    elif role in ("system", "developer"):
        found.say("system_empty", "the system message says nothing", *at)


def _converted(message: dict[str, Any]) -> Message:
    role = message["role"]
    return Message(
        role="system" if role == "developer" else role,
        content=text_of(message.get("content")),
        weight=1 if _is_trained(message) else 0,
        tool_calls=tools.converted(message.get("tool_calls") or []),
        tool_call_id=message.get("tool_call_id"),
    )


def _is_trained(message: dict[str, Any]) -> bool:
    """Without a weight, or with null as tables write it, an answer counts."""
    return message.get("weight") != 0
