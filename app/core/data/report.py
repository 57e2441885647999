"""What reading a file found: problems, which make it invalid, and warnings, which do not."""

from collections import Counter
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, computed_field

from app.core.data.codes import CODES
from app.core.data.place import Place, Step, column_of, path_of

MAX_LISTED = 100
MAX_TOLD = 300  # characters of a message or path


class Problem(BaseModel):
    """One finding. `line` and `column` count from 1; `path` is a JSON path such as `$.messages[2].content`."""

    model_config = ConfigDict(frozen=True)

    line: int
    code: str
    message: str
    path: str = "$"
    column: int | None = None

    @computed_field  # type: ignore[prop-decorator]  # as pydantic's documentation has it
    @property
    def advice(self) -> str:
        """What to do about it."""
        return CODES[self.code].cure

    def told(self) -> str:
        """One line for people."""
        return f"line {self.line}, {self.path}: {self.message}; {self.advice}"


class Report(BaseModel):
    """The outcome of reading a whole file. At most 100 problems and 100 warnings are listed; `counts` holds all, by code.

    `format` is that of the first row that has one; `formats` holds the first line of each.
    """

    model_config = ConfigDict(frozen=True)

    format: str | None = None
    formats: dict[str, int] = {}
    rows: int
    problem_count: int
    warning_count: int = 0
    counts: dict[str, int] = {}
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    @property
    def is_valid(self) -> bool:
        return self.problem_count == 0

    def summary(self) -> str:
        """One line for people: the first problem, and how many more there are."""
        if self.is_valid:
            return f"{self.rows} rows"
        more = f" ({self.problem_count - 1} more)" if self.problem_count > 1 else ""
        return self.problems[0].told() + more


class Findings:
    """Collects what the checks say of a file, row by row. Remembers a hundred of each code, counts all."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.problem_count = 0
        self._line, self._row = 0, b""
        self._kept: dict[str, list[Problem]] = {}

    def begin(self, line: int, row: bytes) -> None:
        """What is said from now on is said of this row."""
        self._line, self._row = line, row

    def say(self, code: str, message: str, *place: Step, column: int | None = None, line: int | None = None) -> None:
        """Add a finding at a place of the row. `line` is for what is found later, of another row."""
        self.counts[code] += 1
        self.problem_count += CODES[code].severity == "problem"
        kept = self._kept.setdefault(code, [])
        if len(kept) < MAX_LISTED:
            column = column or self._column(place)
            kept.append(
                Problem(line=line or self._line, code=code, message=shown(message), path=shown(path_of(place)), column=column)
            )

    def count(self, code: str, times: int) -> None:
        """Add findings that nobody will be told of one by one."""
        if times:
            self.counts[code] += times

    def problems(self) -> tuple[Problem, ...]:
        return self._listed("problem")

    def warnings(self) -> tuple[Problem, ...]:
        return self._listed("warning")

    def _listed(self, severity: str) -> tuple[Problem, ...]:
        """A hundred at most, by line, and of each code some: one that is everywhere must not hide the others."""
        lists = [kept for code, kept in self._kept.items() if CODES[code].severity == severity]
        chosen = list(_in_turns(lists))[:MAX_LISTED]
        return tuple(sorted(chosen, key=lambda problem: (problem.line, problem.column or 0)))

    def _column(self, place: Place) -> int | None:
        return column_of(self._row.decode("utf-8", "replace").removeprefix("\ufeff"), place) if place else None


def shown(text: str) -> str:
    """What of a customer's own words can be stored and read: no control character, no half of a surrogate pair, no page."""
    kept = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
    return kept if len(kept) <= MAX_TOLD else kept[:MAX_TOLD] + "…"


def _in_turns(lists: list[list[Problem]]) -> Iterator[Problem]:
    for rank in range(MAX_LISTED):
        for kept in lists:
            if rank < len(kept):
                yield kept[rank]
