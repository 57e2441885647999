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
    """One row of a training file. `tools` are those the row offers, as the API describes functions.

    With `rejected` the row compares: its last message is preferred to that one. With `text` it is no conversation: there are no
    messages, and all of the text is learnt. With `is_good` its last answer has been rated, and is drawn nearer or pushed away.
    """

    messages: tuple[Message, ...]
    line: int
    tools: tuple[dict[str, Any], ...] = ()
    rejected: Message | None = None
    text: str | None = None
    is_good: bool | None = None

    @property
    def sides(self) -> tuple[tuple[Message, ...], ...]:
        """The conversations that the row stands for: one, or two that differ in their last message, the preferred one first."""
        if self.rejected is None:
            return (self.messages,)
        return self.messages, (*self.messages[:-1], self.rejected)
