"""Which checkpoints of a run are kept whole: one rule for the trainer's disk and for storage (docs/decisions/0011)."""

from collections.abc import Mapping
from typing import Any


def kept(metrics: Mapping[int, Mapping[str, Any]], *, newest: int) -> set[int]:
    """Of steps, given with the metrics of their checkpoints: `newest`, the one before it, and the best by validation loss.

    The one before is there for the case that `newest` is damaged. What lies ahead of `newest` was, and is not gone on from.
    """
    reached = sorted(step for step in metrics if step <= newest)
    found = best(metrics, newest=newest)
    return {*reached[-2:], newest if found is None else found}


def best(metrics: Mapping[int, Mapping[str, Any]], *, newest: int) -> int | None:
    """The step with the lowest validation loss, of equal ones the first; None where none was evaluated."""
    judged = sorted(step for step, found in metrics.items() if step <= newest and "valid_loss" in found)
    return min(judged, key=lambda step: metrics[step]["valid_loss"], default=None)
