"""`{"instruction", "input"?, "output"}`: becomes a chat of two messages, of which the first is instruction, empty line, input."""

from typing import Any

from app.core.chat import Chat, Message
from app.core.data import fields
from app.core.data.report import Findings

KEYS = frozenset({"instruction", "input", "output"})


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    for key in ("instruction", "output"):
        fields.require_text(row, key, found)
    if not isinstance(row.get("input") or "", str):
        found.say("field_not_text", "input must be a string", "input")
    fields.ignore(row.keys() - KEYS, found, refused=frozenset({"system", "history"}))


def convert(row: dict[str, Any], line: int) -> Chat:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return Chat((Message("user", asked), Message("assistant", row["output"])), line)
