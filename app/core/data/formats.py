"""The formats of files, told apart by their keys. One line each: how it is known, checked and made a chat or a question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from app.core.chat import Chat
from app.core.data import alpaca, chats, completion, evaluation, preference, rated, sharegpt, text
from app.core.data.evaluation import EvaluationRow
from app.core.data.report import Findings


def _always(_: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Format:
    """`marks` are keys of which one is enough, where `is_meant` says so too. `convert` is given checked rows."""

    name: str
    marks: frozenset[str]
    check: Callable[[dict[str, Any], Findings], None]
    convert: Callable[[dict[str, Any], int], Chat]
    is_meant: Callable[[dict[str, Any]], bool] = _always


FORMATS = (
    Format("rated", frozenset({"label"}), rated.check, rated.convert, rated.is_meant),
    Format("chat", frozenset({"messages"}), chats.check, chats.convert),
    Format("sharegpt", frozenset({"conversations"}), sharegpt.check, sharegpt.convert),
    Format("preference", frozenset(preference.OUTPUTS), preference.check, preference.convert),
    Format("alpaca", frozenset({"instruction"}), alpaca.check, alpaca.convert),
    Format("completion", completion.KEYS, completion.check, completion.convert),
    Format("text", text.KEYS, text.check, text.convert),
)


@dataclass(frozen=True)
class EvaluationFormat:
    """One that models are asked from. `convert` is given checked rows."""

    name: str
    marks: frozenset[str]
    check: Callable[[dict[str, Any], Findings], None]
    convert: Callable[[dict[str, Any], int], EvaluationRow]
    is_meant: Callable[[dict[str, Any]], bool] = _always


TO_TRAIN, TO_EVALUATE = "fine-tune", "evals"  # the purposes of files
ITEM, CHAT, MULTIPLE_CHOICE = "item", "chat", "multiple_choice"
EVALUATED = (
    EvaluationFormat(ITEM, evaluation.ITEM_KEYS, evaluation.check_item, evaluation.of_item),
    EvaluationFormat(CHAT, frozenset({"messages"}), evaluation.check_chat, evaluation.of_chat),
    EvaluationFormat(MULTIPLE_CHOICE, frozenset({"choices"}), evaluation.check_choice, evaluation.of_choice),
)


AnyFormat = TypeVar("AnyFormat", Format, EvaluationFormat)


def find(row: dict[str, Any], among: Sequence[AnyFormat]) -> AnyFormat | None:
    """The first format that a key of the row belongs to."""
    return next((known for known in among if not known.marks.isdisjoint(row) and known.is_meant(row)), None)
