"""`{"prompt", "completion"}`: a question and its answer. Becomes a chat of two messages, each text as it is."""

from typing import Any

from app.core.chat import Chat, Message
from app.core.data import fields
from app.core.data.report import Findings

KEYS = frozenset({"prompt", "completion"})


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    for key in ("prompt", "completion"):
        fields.require_text(row, key, found)
    fields.ignore(row.keys() - KEYS, found, refused=frozenset({"tools", "system"}))


def convert(row: dict[str, Any], line: int) -> Chat:
    return Chat((Message("user", row["prompt"]), Message("assistant", row["completion"])), line)
