"""What an evaluation asked about a line of its file, and what was to be answered: for whoever reads the answers."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """`reference` is null where the row has none."""

    question: str
    reference: str | None


def row_of(line: str) -> Row | None:
    """None of a line that is too long to be here whole. Rows were found valid before they were asked about."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    match row:
        case {"messages": [*_, {"content": str(question)}, {"content": str(reference)}]}:
            return Row(question, reference)
        case {"question": str(question), "answer": answer}:
            return Row(question, str(answer))
        case {"item": dict(item)}:
            return Row(json.dumps(item, ensure_ascii=False, indent=2), None)
    return None
