"""Every file of tests/data/corpus is found to hold exactly what the table beside it says."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.core import data
from app.core.data.codes import CODES

FOLDER = Path(__file__).parents[1] / "data"
EXPECTED: dict[str, dict[str, Any]] = tomllib.loads((FOLDER / "expected.toml").read_text())
# said of a base, of storage or of a process, and not of what a file holds; a line of a megabyte is made where it is tested
ELSEWHERE = {"row_not_rendered", "row_too_long", "row_truncated", "file_damaged", "limits_exceeded", "line_too_long"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_holds_what_the_table_says(name: str) -> None:
    expected = EXPECTED[name]
    with (FOLDER / "corpus" / f"{name}.jsonl").open("rb") as file:
        report = (data.examine_evaluation if name.startswith("evaluation-") else data.examine)(data.split_lines(file))
    found = sorted((*report.problems, *report.warnings), key=lambda problem: (problem.line, problem.code))
    wanted = sorted(expected["findings"], key=lambda finding: (finding["line"], finding["code"]))

    assert (report.format, report.rows) == (expected.get("format"), expected["rows"])
    assert [(problem.line, problem.code) for problem in found] == [(finding["line"], finding["code"]) for finding in wanted]
    for problem in found:
        told = problem.model_dump()
        assert any(finding.items() <= told.items() for finding in wanted), told
    assert report.problem_count + report.warning_count == sum(report.counts.values()) == len(wanted)


def test_every_file_has_its_entry_and_every_code_its_file() -> None:
    assert {path.stem for path in (FOLDER / "corpus").iterdir()} == EXPECTED.keys()
    assert {finding["code"] for expected in EXPECTED.values() for finding in expected["findings"]} == CODES.keys() - ELSEWHERE
