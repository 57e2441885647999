"""What the formats of plain fields share: texts under fixed keys, and columns that nobody needs."""

from collections.abc import Iterable
from typing import Any

from app.core.data.place import Step
from app.core.data.report import Findings


def require_text(holder: dict[str, Any], key: str, found: Findings, *at: Step) -> None:
    """Say it if there is no text under this key."""
    if key not in holder:
        found.say("field_missing", f"the key {key!r} is missing", *at)
    elif not isinstance(holder[key], str):
        found.say("field_not_text", f"{key} must be a string", *at, key)
    elif not holder[key].strip():
        found.say("field_empty", f"{key} is empty", *at, key)


def ignore(keys: Iterable[str], found: Findings, *at: Step, refused: frozenset[str]) -> None:
    """Public data sets carry columns of their own. `refused` are those that would change what is learnt."""
    for key in keys:
        if key in refused:
            found.say("unknown_key", f"{key!r} is not read in this format; write such rows as chats", *at, key)
        else:
            found.say("key_ignored", f"the column {key!r} is not read", *at, key)
