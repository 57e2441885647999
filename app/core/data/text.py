"""`{"text"}`: plain text, as continued pre-training reads it."""

from typing import Any

from app.core.chat import Chat
from app.core.data import fields
from app.core.data.report import Findings

KEYS = frozenset({"text"})


def check(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a row."""
    fields.require_text(row, "text", found)
    fields.ignore(row.keys() - KEYS, found, refused=frozenset())


def convert(row: dict[str, Any], line: int) -> Chat:
    return Chat((), line, text=row["text"])
