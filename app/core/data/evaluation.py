"""Rows of evaluation files: `{"item": …}`, chats whose last message is the reference, questions with lettered choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.core import multiple_choice
from app.core.data import chats, fields, messages
from app.core.data.report import Findings

ITEM_KEYS = frozenset({"item"})
CHOICE_KEYS = frozenset({"question", "choices", "answer"})

PromptMessage = dict[str, str]


@dataclass(frozen=True)
class EvaluationRow:
    """What graders know of a row as `item`, and what a model is asked: None where the evaluation's own messages say it."""

    line: int
    item: dict[str, Any]
    prompt: Sequence[PromptMessage] | None


def check_item(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with an item's row."""
    for key in row.keys() - ITEM_KEYS:
        found.say("unknown_key", f"unknown key {key!r}; put it into `item`", key)
    if not isinstance(row["item"], dict) or not row["item"]:
        found.say("item_invalid", "`item` must be an object with at least one field", "item")


def check_chat(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a chat to be continued."""
    for key in row.keys() - {"messages"}:
        found.say("unknown_key", f"unknown key {key!r}; a chat to evaluate holds `messages` and nothing else", key)
    roles = chats.check_conversation({"messages": row["messages"]}, found)
    if not roles:
        return
    if "tool" in roles or any(message.get("tool_calls") for message in row["messages"]):
        found.say("tools_not_evaluated", "the chat calls tools, and answers are asked for without any", "messages")
    last, at = row["messages"][-1], len(roles) - 1
    if roles[at] != "assistant" or at == 0 or not messages.text_of(last.get("content")).strip():
        found.say("reference_missing", "the last message must be the assistant's answer to the others", "messages", at)


def check_choice(row: dict[str, Any], found: Findings) -> None:
    """Say what is wrong with a multiple-choice question."""
    fields.require_text(row, "question", found)
    fields.ignore(row.keys() - CHOICE_KEYS, found, refused=frozenset())
    choices, answer = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= multiple_choice.MOST_CHOICES
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        found.say("choices_invalid", f"`choices` must be a list of 2 to {multiple_choice.MOST_CHOICES} texts", "choices")
        return
    letters = [multiple_choice.letter_of(index) for index in range(len(choices))]
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    if not is_index and not (isinstance(answer, str) and answer.strip().upper() in letters):
        wanted = f"an index from 0 to {len(choices) - 1}, or a letter from A to {letters[-1]}"
        found.say("answer_invalid", f"`answer` must be {wanted}", "answer")


def of_item(row: dict[str, Any], line: int) -> EvaluationRow:
    return EvaluationRow(line, row["item"], None)


def of_chat(row: dict[str, Any], line: int) -> EvaluationRow:
    """Graders find the last message as `item.reference`, the others as `item.messages`."""
    said = [{"role": message["role"], "content": messages.text_of(message.get("content"))} for message in row["messages"]]
    return EvaluationRow(line, {"messages": said[:-1], "reference": said[-1]["content"]}, said[:-1])


def of_choice(row: dict[str, Any], line: int) -> EvaluationRow:
    """Graders find the letter of the right choice as `item.reference`."""
    letter = multiple_choice.letter_of(row["answer"])
    text = multiple_choice.question_text(row["question"], row["choices"])
    item = {"question": row["question"], "choices": row["choices"], "reference": letter}
    return EvaluationRow(line, item, [{"role": "user", "content": text}])
