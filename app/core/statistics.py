"""How sure a comparison is: bootstrap intervals, McNemar's test, paired differences. Same numbers in, same numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES, LEVEL = 10_000, 0.95
_AT_ONCE = 2**21  # drawn indices in memory

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """`low` and `high` hold the middle 95 % of resampled means; both are `mean` where one score is all there is."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Scores less those they are compared with, row by row. `p_value` is two-sided; `test` names how it was found."""

    difference: Interval
    better: int
    worse: int
    test: str
    p_value: float


def bootstrap(scores: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The mean with its percentile interval (Efron 1979). Raises ValueError without a score."""
    return _interval(np.asarray(scores, np.float64), seed, resamples)[0]


def paired(scores: Sequence[float], others: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> Paired:
    """Compare two models on the same rows: McNemar's exact test if every score is 0 or 1, else the paired bootstrap."""
    ours, theirs = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    differences = ours - theirs
    interval, means = _interval(differences, seed, resamples)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        return Paired(interval, better, worse, "mcnemar", mcnemar_p(better, worse))
    # how often chance moves the mean to the other side of 0; never 0 itself, since no chance was drawn that often
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Paired(interval, better, worse, "paired_bootstrap", min(1.0, 2 * (beyond + 1) / (resamples + 1)))


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact p of McNemar's test: a sign test on the pairs where the two differ."""
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(max(gained, lost), differing + 1))
    return min(1.0, 2 * tail / (1 << differing))


def _interval(scores: Scores, seed: int, resamples: int) -> tuple[Interval, Scores]:
    """And the resampled means themselves."""
    count = len(scores)
    if count == 0:
        raise ValueError("there is nothing to resample")
    generator = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _AT_ONCE // count)
    parts = [
        scores[generator.integers(0, count, (min(at_once, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, at_once)
    ]
    means = np.concatenate(parts)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(scores.mean()), float(low), float(high)), means
