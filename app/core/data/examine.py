"""The first pass over a file: every line is looked at once, and little is remembered of it."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from app.core.chat import Chat
from app.core.data import formats, rows
from app.core.data.evaluation import EvaluationRow
from app.core.data.formats import AnyFormat
from app.core.data.report import MAX_LISTED, Findings, Report

MAX_COMPARED = 4 * 1024 * 1024  # rows looked at for duplicates: twelve bytes of each are kept until the end

_BINARY = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive or an Excel sheet",
    b"PAR1": "a Parquet table",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"SQLite format 3": "an SQLite database",
}


def examine(lines: Iterable[bytes]) -> Report:
    """Read every line and report. Never raises for what a file may hold; what stands behind a binary beginning is not read."""
    return _examine(lines, formats.FORMATS)


def examine_evaluation(lines: Iterable[bytes]) -> Report:
    """The same for a file that models are to be asked from."""
    return _examine(lines, formats.EVALUATED)


def _examine(lines: Iterable[bytes], among: Sequence[AnyFormat]) -> Report:
    found, first_lines, seen = Findings(), dict[str, int](), _Seen()
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line or line.isspace():
            continue
        if count == 0 and (kind := _binary_kind(line)):
            found.begin(number, b"")
            found.say("file_binary", f"the file is {kind}")
            break
        count += 1
        if checked := rows.check(line, number, found, among):
            first_lines.setdefault(checked[0].name, number)
        seen.add(line, number)
    found.begin(1, b"")
    seen.tell(found)
    _judge(found, first_lines, count)
    return Report(
        format=next(iter(first_lines), None),
        formats=first_lines,
        rows=count,
        problem_count=found.problem_count,
        warning_count=found.counts.total() - found.problem_count,
        counts=dict(found.counts),
        problems=found.problems(),
        warnings=found.warnings(),
    )


def read(lines: Iterable[bytes]) -> Iterator[Chat]:
    """The chats of a valid file. Raises RowError at the first row that is none."""
    for number, line in enumerate(lines, start=1):
        if line and not line.isspace():
            yield rows.to_chat(line, number)


def read_evaluation(lines: Iterable[bytes]) -> Iterator[EvaluationRow]:
    """The questions of a valid evaluation file. Raises RowError at the first row that is none."""
    for number, line in enumerate(lines, start=1):
        if line and not line.isspace():
            yield rows.to_evaluation_row(line, number)


def _judge(found: Findings, first_lines: dict[str, int], count: int) -> None:
    """What only the whole file shows."""
    if count == 0 and not found.problem_count:
        found.say("file_empty", "the file holds no rows")
    if len(first_lines) > 1:
        told = ", ".join(f"{name} from line {line}" for name, line in first_lines.items())
        found.say("formats_mixed", f"rows of several formats: {told}", line=list(first_lines.values())[1])
    if count and not found.problem_count and found.counts["nothing_to_train"] == count:
        found.say("file_untrainable", "no row has an answer of weight 1")


def _binary_kind(line: bytes) -> str | None:
    return next((kind for magic, kind in _BINARY.items() if line.startswith(magic)), None)


class _Seen:
    """Rows seen, by their hash: enough to know that one comes again, and where it came first."""

    def __init__(self) -> None:
        self._hashes, self._lines = array("q"), array("I")

    def add(self, row: bytes, line: int) -> None:
        if len(self._hashes) < MAX_COMPARED:
            self._hashes.append(hash(row))
            self._lines.append(line)

    def tell(self, found: Findings) -> None:
        hashes = np.frombuffer(self._hashes, np.int64) if self._hashes else np.zeros(0, np.int64)
        order = np.argsort(hashes, kind="stable")
        in_order = hashes[order]
        again = np.sort(order[1:][in_order[1:] == in_order[:-1]])
        for index in again[:MAX_LISTED].tolist():
            first = order[np.searchsorted(in_order, hashes[index])]
            found.say("duplicate_row", f"the same row as line {self._lines[first]}", line=self._lines[index])
        found.count("duplicate_row", max(0, len(again) - MAX_LISTED))
