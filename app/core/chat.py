"""A conversation as a value: what training, preview and serving hand to `app.core.render`."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The assistant asks for a function to be called."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn as context without training on it. `tool_call_id`: the call it answers."""

    role: str
    content: str
    weight: Literal[0, 1] = 1
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """One row of a training file. `tools` are those the row offers, as the API describes functions."""

    messages: tuple[Message, ...]
    line: int
    tools: tuple[dict[str, Any], ...] = ()
