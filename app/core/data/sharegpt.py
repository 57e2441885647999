"""`{"conversations": [{"from", "value"}, …], "system"?}`: becomes a chat, turn by turn; `system` comes first."""

from typing import Any

from app.core.chat import Chat, Message
from app.core.data import fields
from app.core.data.messages import check_order
from app.core.data.place import Step
from app.core.data.report import Findings

KEYS = frozenset({"conversations", "system"})
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    fields.ignore(row.keys() - KEYS, found, refused=frozenset({"tools"}))
    if not isinstance(row.get("system") or "", str):
        found.say("field_not_text", "system must be a string", "system")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        found.say("messages_missing", "`conversations` must be a list of at least one turn", "conversations")
        return
    roles = [_check(turn, found, "conversations", index) for index, turn in enumerate(turns)]
    if None not in roles:
        check_order([role for role in roles if role], found, "conversations")


def convert(row: dict[str, Any], line: int) -> Chat:
    said = [Message(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    opening = [Message("system", row["system"])] if row.get("system") else []
    return Chat((*opening, *said), line)


def _check(turn: Any, found: Findings, *at: Step) -> str | None:
    if not isinstance(turn, dict):
        found.say("message_not_object", "a turn must be an object with `from` and `value`", *at)
        return None
    speaker = turn.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        hint = "; a list of `role` and `content` is called `messages`" if "role" in turn else ""
        found.say("role_unknown", f"from must be one of {', '.join(ROLES)}, not {speaker!r}{hint}", *at, "from")
    if role in ("assistant", None):
        fields.require_text(turn, "value", found, *at)
    elif not isinstance(turn.get("value"), str):
        found.say("field_not_text", "value must be a string", *at, "value")
    elif not turn["value"].strip():
        found.say(f"{role}_empty", f"the turn of role {role} says nothing", *at, "value")
    fields.ignore(turn.keys() - {"from", "value"}, found, *at, refused=frozenset({"weight"}))
    return role
