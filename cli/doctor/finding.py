"""What a check has found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]
MARKS: dict[State, str] = {"ok": "ok", "warning": "WARN", "failed": "FAIL", "skipped": "skip"}


@dataclass(frozen=True)
class Finding:
    """`remedy` is what to type or to change; only what is ok has none."""

    name: str
    state: State
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "warning", found, remedy)


def failed(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "failed", found, remedy)


def skipped(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "skipped", found, remedy)


def as_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """One for each, and one for its remedy."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{MARKS[finding.state]:4}  {finding.name:{width}}  {finding.found}"
        if finding.remedy is not None:
            yield f"{'':{width + 6}}  -> {finding.remedy}"
