"""A curve as a line of text."""

from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` characters, each the mean of its share of the values, from the lowest to the highest of these."""
    count = min(width, len(values))
    if not count:
        return ""
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for mean in means)
