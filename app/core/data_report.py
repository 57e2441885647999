"""What a job's data is like, told in numbers and line numbers: stored with the job, shown in its object and as warnings."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from app.core.chat import MAX_LISTED, Problem
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


class FileReport(_Frozen):
    """One file with one base. `left_out` counts rows by the code of the reason, of which `problems` lists the first."""

    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    max_seq_length: int
    long_rows: LongRows
    rows_too_long: int
    rows_cut: int
    left_out: dict[str, int]
    problems: tuple[Problem, ...]
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
    rows that it tells nothing.
    """

    training: Likeness
    leaked: Likeness | None = None
    compared: int
    boilerplate: float


class DataReport(_Frozen):
    """The second look at a job's data; the first is each file's own report."""

    training: FileReport
    validation: FileReport | None = None
    likeness: Comparison | None = None

    def warnings(self) -> Iterator[str]:
        """What the job's owner should know before it trains, a sentence each."""
        for name, file in (("training", self.training), ("validation", self.validation)):
            if file is not None:
                yield from _of_file(file, name)
        if self.likeness is not None:
            yield from _of_likeness(self.likeness)


def _of_file(file: FileReport, name: str) -> Iterator[str]:
    for problem in file.problems:
        yield f"Line {problem.line} of the {name} file is left out: {problem.message}"
    if (unlisted := file.left_out_count - len(file.problems)) > 0:
        yield f"{unlisted} more rows of the {name} file are left out; the first {MAX_LISTED} are listed"
    if file.rows_cut:
        yield f"{file.rows_cut} rows of the {name} file have more than {file.max_seq_length} tokens: their beginnings are cut off"


def _of_likeness(found: Comparison) -> Iterator[str]:
    sentences = [
        (found.training.exact, "rows of the training file are the same as an earlier one", "each is trained on again"),
        (found.training.near, "rows of the training file are nearly the same as an earlier one", "look whether they should be"),
    ]
    if found.leaked is not None:
        advice = "what they measure is memory; take them out of one of the files"
        sentences += [
            (found.leaked.exact, "rows of the validation file are trained on too", advice),
            (found.leaked.near, "rows of the validation file are nearly the same as one that is trained on", advice),
        ]
    for matches, what, advice in sentences:
        if matches.count:
            lines = [f"line {match.line} as {match.of_line}" for match in matches.listed[:_SHOWN_IN_A_SENTENCE]]
            more = ", …" if matches.count > len(lines) else ""
            yield f"{matches.count} {what} ({', '.join(lines)}{more}); {advice}"
