"""The metrics of a job as the CSV file that the API promises."""

import csv
import io
from typing import Any

from sqlalchemy import orm, select

from app.core import methods
from app.models import JobEvent

COMPARING = tuple(f"{of}{name}" for of in ("", "valid_") for name in methods.METRICS)
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_NAMES = {"train_mean_token_accuracy": "train_accuracy"}


def csv_of(session: orm.Session, job_id: str) -> bytes:
    """One row a step."""
    steps = steps_of(session, job_id)
    text = io.StringIO(newline="")
    columns = [*COLUMNS, *(name for name in COMPARING if any(name in row for row in steps.values()))]
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({_NAMES.get(name, name): value for name, value in steps[step].items()} for step in sorted(steps))
    return text.getvalue().encode()


def steps_of(session: orm.Session, job_id: str) -> dict[int, dict[str, Any]]:
    """All that was measured at each step. One that a resumed attempt repeated counts as it came out the last time."""
    steps: dict[int, dict[str, Any]] = {}
    metrics = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics").order_by(JobEvent.sequence)
    for data in session.scalars(metrics):
        if data is not None:
            steps.setdefault(data["step"], {}).update(data)
    return steps
