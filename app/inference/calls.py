"""Tools that an answer calls, in the words that the base's template taught it: the way back from `app.core.render`."""

import json
import re
from collections.abc import Collection
from typing import Any

from app.core import ids
from app.core.pieces import overlap

_TAGGED = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)


class Speech:
    """One answer: its text as it comes, its calls once it has ended.

    `opening` is what a call begins with: a tag stands anywhere, a bracket only where the whole answer is a call. What begins like
    a call and is none, or calls what nobody offered, is text. At most `most` calls are kept.
    """

    def __init__(self, opening: str, names: Collection[str], *, most: int | None = None) -> None:
        self._opening, self._names, self._most = opening, names, most
        self._held, self._has_told = "", False

    def push(self, text: str) -> str:
        """What is surely text; what may be a call is held back."""
        self._held += text
        at = self._held.find(self._opening)
        if at < 0:
            keep = overlap(self._held, self._opening) if self._is_tag else 0
            at = len(self._held) - keep
        elif not self._is_tag and (self._has_told or self._held[:at].strip()):
            at = len(self._held)
        if not self._has_told and not self._held[:at].strip():
            return ""  # white space before a call is none of its answer
        told, self._held = self._held[:at], self._held[at:]
        self._has_told |= bool(told)
        return told

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back: text, or calls as the API writes them."""
        found = self._found()
        if not found or any(name not in self._names for name, _ in found):
            return self._held, []
        return "", [_written(name, arguments) for name, arguments in found[: self._most]]

    @property
    def _is_tag(self) -> bool:
        return len(self._opening) > 1

    def _found(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and arguments of each call; none if there is anything else in the text."""
        bodies = _TAGGED.findall(self._held) if self._is_tag else [self._held]
        if self._is_tag and _TAGGED.sub("", self._held):
            return []
        try:
            said = [json.loads(body) for body in bodies]
        except ValueError:
            return []
        if not self._is_tag and isinstance(said[0], list):
            said = said[0]
        calls = [_call(one) for one in said]
        return [call for call in calls if call is not None] if None not in calls else []


def _call(said: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments, which Llama 3.1 calls parameters."""
    if not isinstance(said, dict):
        return None
    name, arguments = said.get("name"), said.get("arguments", said.get("parameters"))
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _written(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    told = json.dumps(arguments, ensure_ascii=False)
    return {"id": ids.new("call_"), "type": "function", "function": {"name": name, "arguments": told}}
