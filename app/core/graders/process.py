"""The grading process: `python -m app.core.graders.process` grades what its order holds, within limits.

Patterns, schemas and texts are strangers': the worst of them costs a process, not a worker.
"""

import sys
from typing import Any

from pydantic import BaseModel

from app.core import limited
from app.core.graders import grade
from app.core.graders.grade import Grade, SchemaRefused
from app.core.graders.spec import LOCAL, Grader, singles
from app.core.graders.template import Sample

MEMORY_BYTES = 512 * 2**20


class Answered(BaseModel):
    """An answer of a model to an item of a file."""

    item: dict[str, Any]
    output_text: str


class Order(BaseModel):
    graders: list[Grader]
    answers: list[Answered]


class Told(BaseModel):
    """For each answer the grades by key, of all graders but the judges; or why a grader cannot be used."""

    grades: list[dict[str, Grade]] = []
    refused: str | None = None


def run(order: Order, *, cpu_seconds: int) -> Told:
    """In a process of its own. Raises limited.TookTooMuch, limited.Died."""
    said = limited.run(
        "app.core.graders.process",
        order.model_dump_json(),
        memory_bytes=MEMORY_BYTES,
        cpu_seconds=cpu_seconds,
        wall_seconds=4.0 * cpu_seconds + 10.0,
    )
    return Told.model_validate_json(said)


def main() -> int:
    try:
        sys.stdout.write(_answer(Order.model_validate_json(limited.accept())).model_dump_json())
    except MemoryError:
        return limited.OUT_OF_MEMORY
    return 0


def _answer(order: Order) -> Told:
    try:
        grade.check(order.graders)
    except SchemaRefused as refused:
        return Told(refused=str(refused))
    return Told(grades=[_graded(order, answered) for answered in order.answers])


def _graded(order: Order, answered: Answered) -> dict[str, Grade]:
    sample = Sample(answered.output_text)
    return {
        key: grade.grade(grader, answered.item, sample) for key, grader in singles(order.graders) if isinstance(grader, LOCAL)
    }


if __name__ == "__main__":
    sys.exit(main())
