"""A validation report as text: the service's, or that of `tunesmith files check`, which are the same."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cli.table import columns

SHOWN_LINES, SHOWN_CHARACTERS = 10, 160

Problem = Mapping[str, Any]


def lines_of(path: Path, report: Mapping[str, Any]) -> Iterator[str]:
    """The verdict, what is wrong, and the lines in which it stands."""
    verdict = "INVALID" if report["problem_count"] else "valid"
    counts = f"{report['rows']} rows, {report['problem_count']} problems, {report['warning_count']} warnings"
    yield f"{path}: {verdict}; format {report['format'] or 'unknown'}, {counts}"
    yield from table("problems", report["problems"], report["problem_count"])
    yield from table("warnings", report["warnings"], report["warning_count"])
    yield from _offending(path, report["problems"])


def table(title: str, listed: Sequence[Problem], count: int) -> Iterator[str]:
    if not listed:
        return
    yield f"\n{title}" + (f" (the first {len(listed)} of {count})" if count > len(listed) else "")
    rows = [("LINE", "CODE", "PATH", "WHAT; CURE")]
    for problem in listed:
        where = f"{problem['line']}:{problem['column']}" if problem["column"] else str(problem["line"])
        rows.append((where, problem["code"], problem["path"], f"{problem['message']}; {problem['advice']}"))
    yield from columns(rows)


def _offending(path: Path, problems: Sequence[Problem]) -> Iterator[str]:
    """The first of the lines with problems, each from a little before the first of its problems."""
    columns_of = {problem["line"]: problem["column"] or 1 for problem in reversed(problems)}
    if not columns_of:
        return
    yield "\nthese lines" if len(columns_of) <= SHOWN_LINES else f"\nthe first {SHOWN_LINES} of these lines"
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        bad = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if number in columns_of)
        for number, line in islice(bad, SHOWN_LINES):
            start = max(0, columns_of[number] - SHOWN_CHARACTERS // 2)
            shown = line[start : start + SHOWN_CHARACTERS]
            yield f"{number:>6} | {'…' if start else ''}{shown}{'…' if len(line) > start + SHOWN_CHARACTERS else ''}"
