"""Which checkpoints of a run are kept whole: one rule for the trainer's disk and for storage (docs/decisions/0011)."""

from collections.abc import Mapping
from typing import Any


def kept(metrics: Mapping[int, Mapping[str, Any]], *, newest: int) -> set[int]:
    """Of steps, given with the metrics of their checkpoints: `newest`, the one before it, and the best by validation loss.

    The one before is there for the case that `newest` is damaged. What lies ahead of `newest` was, and is not gone on from.
    """
    reached = sorted(step for step in metrics if step <= newest)
    judged = [step for step in reached if "valid_loss" in metrics[step]]
    best = min(judged, key=lambda step: metrics[step]["valid_loss"], default=newest)  # of equal ones the first
    return {*reached[-2:], best}
