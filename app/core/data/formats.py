"""The formats of training files, told apart by their keys. One line each: how it is known, checked and made a chat."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.core.chat import Chat
from app.core.data import alpaca, chats, completion, preference, sharegpt, text
from app.core.data.report import Findings


@dataclass(frozen=True)
class Format:
    """`marks` are keys of which one is enough. `convert` is given checked rows."""

    name: str
    marks: frozenset[str]
    check: Callable[[dict[str, Any], Findings], None]
    convert: Callable[[dict[str, Any], int], Chat]


FORMATS = (
    Format("chat", frozenset({"messages"}), chats.check, chats.convert),
    Format("sharegpt", frozenset({"conversations"}), sharegpt.check, sharegpt.convert),
    Format("preference", frozenset(preference.OUTPUTS), preference.check, preference.convert),
    Format("alpaca", frozenset({"instruction"}), alpaca.check, alpaca.convert),
    Format("completion", completion.KEYS, completion.check, completion.convert),
    Format("text", text.KEYS, text.check, text.convert),
)


def find(row: dict[str, Any]) -> Format | None:
    """The first format that a key of the row belongs to."""
    return next((known for known in FORMATS if not known.marks.isdisjoint(row)), None)
