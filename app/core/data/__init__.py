"""Training files: what they hold, of which format, and all that is wrong with them. docs/data.md is for their owners."""

from app.core.data.examine import examine, read
from app.core.data.lines import MAX_LINE_BYTES, split_lines
from app.core.data.report import MAX_LISTED, Problem, Report
from app.core.data.rows import RowError

__all__ = ["MAX_LINE_BYTES", "MAX_LISTED", "Problem", "Report", "RowError", "examine", "read", "split_lines"]
