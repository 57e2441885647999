"""`{"messages": […], "label": true}`: an answer that somebody called good, or bad, without another to compare it with.

TRL's `{"prompt", "completion", "label"}` too, of which both are texts, or both lists of messages.
"""

from dataclasses import replace
from typing import Any

from app.core.chat import Chat
from app.core.data import chats, completion, messages, preference
from app.core.data.report import Findings

KEYS = chats.KEYS | {"label"}
SPLIT_KEYS = frozenset({"prompt", "completion", "tools", "label"})


def is_meant(row: dict[str, Any]) -> bool:
    """Whether a row with a `label` is one of these. Prompts and completions with a column of another kind were never rated."""
    return "messages" in row or (isinstance(row["label"], bool) and not completion.KEYS.isdisjoint(row))


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    if not isinstance(row["label"], bool):
        found.say("label_invalid", f"label must be true or false, not {row['label']!r}", "label")
    if "messages" in row:
        _check_keys(row, KEYS, found)
        roles = chats.check_conversation(row, found)
        if roles and roles[-1] != "assistant":
            message = f"the label rates the last message, and that has role {roles[-1]}"
            found.say("rating_misplaced", message, "messages", len(roles) - 1)
        elif roles:
            messages.check_order(roles, found, "messages")
    elif isinstance(row.get("prompt"), list):
        _check_keys(row, SPLIT_KEYS, found)
        chats.check_conversation(row, found, key="prompt")
        preference.check_output(row.get("completion"), found, "completion")
    else:
        completion.check({key: value for key, value in row.items() if key != "label"}, found)


def convert(row: dict[str, Any], line: int) -> Chat:
    """Only the last answer counts: what the assistant said before it is context."""
    if isinstance(row.get("prompt"), str):
        return replace(completion.convert(row, line), is_good=row["label"])
    chat = chats.convert(row if "messages" in row else row | {"messages": row["prompt"] + row["completion"]}, line)
    *asked, answer = chat.messages
    said = (*(replace(message, weight=0) for message in asked), replace(answer, weight=1))
    return replace(chat, messages=said, is_good=row["label"])


def _check_keys(row: dict[str, Any], keys: frozenset[str], found: Findings) -> None:
    for key in row.keys() - keys:
        found.say("unknown_key", f"unknown key {key!r}; such a row holds {', '.join(sorted(keys))}", key)
