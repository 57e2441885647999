"""Training and evaluation files: what they hold, of which format, what is wrong with them. docs/data.md is for their owners."""

from app.core.data.evaluation import EvaluationRow
from app.core.data.examine import examine, examine_evaluation, read, read_evaluation
from app.core.data.formats import CHAT, ITEM, MULTIPLE_CHOICE, TO_EVALUATE, TO_TRAIN
from app.core.data.lines import MAX_LINE_BYTES, split_lines
from app.core.data.report import MAX_LISTED, Problem, Report
from app.core.data.rows import RowError

__all__ = [
    "CHAT",
    "ITEM",
    "MAX_LINE_BYTES",
    "MAX_LISTED",
    "MULTIPLE_CHOICE",
    "TO_EVALUATE",
    "TO_TRAIN",
    "EvaluationRow",
    "Problem",
    "Report",
    "RowError",
    "examine",
    "examine_evaluation",
    "read",
    "read_evaluation",
    "split_lines",
]
