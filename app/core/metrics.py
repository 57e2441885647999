"""What every process's metrics have in common."""

from collections.abc import Iterable
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # of what somebody waits for
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)


def new_registry() -> CollectorRegistry:
    """With memory, processor time and open files of this process, and nothing of others: there may be two in one process."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every one, that nobody asks for
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def at_zero(family: Counter | Histogram, *values: Iterable[str]) -> None:
    """Tell every series of it from the beginning: of one that comes with its first event, Prometheus sees no increase."""
    for labels in product(*values):
        family.labels(*labels)


def gauge(
    name: str, help: str, labels: Iterable[str] = (), values: Iterable[tuple[tuple[str, ...], float]] = ()
) -> GaugeMetricFamily:
    """One family with all its values, for a collector that reads them when it is asked."""
    family = GaugeMetricFamily(name, help, labels=tuple(labels))
    for of, value in values:
        family.add_metric(of, value)
    return family
