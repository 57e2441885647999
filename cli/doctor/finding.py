"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "skipped"]


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
