"""What a job's data is like, told in numbers and line numbers: stored with the job, shown in its object and as warnings."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from app.core.data import MAX_LISTED, Problem
from app.core.spec import LongRows

_SHOWN_IN_A_SENTENCE = 5


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class LengthReport(_Frozen):
    """Tokens of the rendered rows, before any is left out or cut. `histogram` counts rows by the next power of two."""

    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    histogram: dict[int, int]


class SpeakerReport(_Frozen):
    """Messages of a role in the examples, and their tokens. The end of an assistant's turn is the assistant's."""

    messages: int
    tokens: int


class SetReport(_Frozen):
    """A set of examples. `longest` is in tokens, as all lengths are; `rated_good` and `rated_bad` where answers are rated."""

    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    rated_good: int = 0
    rated_bad: int = 0


class FileReport(SetReport):
    """What one file becomes with one base: an example a row, or several of a long text. `left_out` counts rows by the code of
    the reason, of which `problems` lists the first; `cut` lists the first rows that lost their beginning.
    """

    rows: int
    max_seq_length: int
    long_rows: LongRows
    rows_too_long: int
    rows_cut: int
    left_out: dict[str, int]
    problems: tuple[Problem, ...]
    cut: tuple[Problem, ...]
    lengths: LengthReport | None
    speakers: dict[str, SpeakerReport]

    @property
    def left_out_count(self) -> int:
        return sum(self.left_out.values())


class Match(_Frozen):
    """The row of `line` says what an earlier one says; `of_line` is in the training file."""

    line: int
    of_line: int
    similarity: float


class Matches(_Frozen):
    """All are counted, the first are listed."""

    count: int = 0
    listed: tuple[Match, ...] = ()


class Likeness(_Frozen):
    """Rows that are the same, token for token, and rows that are nearly so."""

    exact: Matches = Matches()
    near: Matches = Matches()


class Comparison(_Frozen):
    """`training`: rows like an earlier one of that file; `leaked`: rows of the validation file like one that is trained on.

    `compared` rows were long enough to be compared nearly; `boilerplate` is the part of what is said that stands in so many
    rows that it tells nothing. Not `is_whole`: so many pairs were near each other that not all were compared.
    """

    training: Likeness
    leaked: Likeness | None = None
    compared: int
    boilerplate: float
    is_whole: bool = True


class SplitReport(_Frozen):
    """The training file's examples in two parts."""

    kept: SetReport
    held_back: SetReport


class DataReport(_Frozen):
    """The second look at a job's data; the first is each file's own report. `training` and `validation` are of whole files."""

    training: FileReport
    validation: FileReport | None = None
    split: SplitReport | None = None
    likeness: Comparison

    @property
    def trained_on(self) -> SetReport:
        return self.split.kept if self.split else self.training

    @property
    def validated_on(self) -> SetReport | None:
        return self.split.held_back if self.split else self.validation

    def warnings(self) -> Iterator[str]:
        """What the job's owner should know before it trains, a sentence each."""
        yield from _of_file(self.training, "")
        if self.validation is not None:
            yield from _of_file(self.validation, " of the validation file")
        yield from _of_likeness(self.likeness)


def brief(report: dict[str, Any]) -> dict[str, Any]:
    """A report as it is stored, this or a file's own, without the rows that it lists: a page of a hundred would be megabytes."""

    def shown(value: Any) -> Any:
        return brief(value) if isinstance(value, dict) else [] if isinstance(value, list) else value

    return {key: shown(value) for key, value in report.items()}


def _of_file(file: FileReport, of_which: str) -> Iterator[str]:
    for fate, listed, count in (("left out", file.problems, file.left_out_count), ("cut", file.cut, file.rows_cut)):
        for problem in listed:
            yield f"Line {problem.line}{of_which} is {fate}: {problem.message}"
        if count > MAX_LISTED:
            yield f"{count - MAX_LISTED} more lines{of_which} are {fate}; the first {MAX_LISTED} are listed"


def _of_likeness(found: Comparison) -> Iterator[str]:
    sentences = [
        (
            found.training.exact,
            "rows that are trained on are the same as an earlier one",
            "leave one, unless it is to count more",
        ),
        (found.training.near, "rows that are trained on are nearly the same as an earlier one", "look whether they should be"),
    ]
    if found.leaked is not None:
        advice = "what they measure is memory; take them out of one side"
        sentences += [
            (found.leaked.exact, "rows for validation are trained on too", advice),
            (found.leaked.near, "rows for validation are nearly the same as one that is trained on", advice),
        ]
    for matches, what, advice in sentences:
        if matches.count:
            lines = [f"line {match.line} as {match.of_line}" for match in matches.listed[:_SHOWN_IN_A_SENTENCE]]
            more = ", …" if matches.count > len(lines) else ""
            yield f"{matches.count} {what} ({', '.join(lines)}{more}); {advice}"
