"""Jobs side by side, as a table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cli.jobs.sparkline import sparkline
from cli.table import columns

CURVE_WIDTH = 24

Compared = Mapping[str, Any]


def lines_of(compared: Sequence[Compared]) -> Iterator[str]:
    """A column for each job: the settings that differ, then what came of them. What is true of none is left out."""
    rows = [("", *(str(job["id"]) for job in compared)), *_settings(compared, "requested"), *_settings(compared, "resolved")]
    for name, told in _ROWS.items():
        if any(cells := [told(job) for job in compared]):
            rows.append((name, *(cell or "-" for cell in cells)))
    for grader in _graders(compared):
        rows.append((f"{grader} (evaluated)", *(_score(job, grader) for job in compared)))
    return columns(rows)


def _settings(compared: Sequence[Compared], part: str) -> Iterator[tuple[str, ...]]:
    settings = [job[part] or {} for job in compared]
    for name in dict.fromkeys(name for of_job in settings for name in of_job):
        yield f"{name} ({part})", *(_said(of_job.get(name)) for of_job in settings)


def _said(value: Any) -> str:
    return "-" if value is None else str(value)


def _curve(of: str, metric: str) -> Callable[[Compared], str]:
    def drawn(job: Compared) -> str:
        values = [point["metrics"][metric] for point in job["curves"][of] if metric in point["metrics"]]
        return f"{sparkline(values, CURVE_WIDTH)} {values[-1]:.4f}" if values else ""

    return drawn


def _valid_loss(job: Compared) -> str:
    if not (found := job["validation"]):
        return ""
    published = f", {found['published']:.4f} published" if found["published"] is not None else ""
    return f"{found['best']['valid_loss']:.4f} at step {found['best']['step']}{published}"


def _held_out(job: Compared) -> str:
    found = job["held_out"]
    return f"{found['base']['loss']:.4f} → {found['adapter']['loss']:.4f}" if found else ""


def _price(job: Compared) -> str:
    price = job["price"]
    return f"{price['amount']} {price['currency']}" if price else ""


def _seconds(name: str) -> Callable[[Compared], str]:
    return lambda job: f"{job[name]:,.0f} s" if job[name] else ""


_ROWS: dict[str, Callable[[Compared], str]] = {
    "status": lambda job: job["status"],
    "error": lambda job: job["error"]["message"] if job["error"] else "",
    "model": lambda job: job["fine_tuned_model"] or "",
    "loss": _curve("train", "train_loss"),
    "validation loss": _curve("validation", "valid_loss"),
    "lowest": _valid_loss,
    "held out, base → adapter": _held_out,
    "tokens trained on": lambda job: f"{job['trained_tokens']:,}" if job["trained_tokens"] else "",
    "time": _seconds("duration_seconds"),
    "of workers": _seconds("worker_seconds"),
    "price": _price,
}


def _graders(compared: Sequence[Compared]) -> list[str]:
    evaluated = (one for job in compared for one in job["evaluations"])
    return list(dict.fromkeys(grader for one in evaluated for grader in one["grades"] or ()))


def _score(job: Compared, grader: str) -> str:
    """In the newest evaluation that has one: they are the newest first."""
    for evaluated in job["evaluations"]:
        score = (evaluated["grades"] or {}).get(grader)
        if score and score["mean"] is not None:
            return f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    return "-"
