"""Whatever dashboards and alerts ask for is told by a process that runs, under that name and with those labels."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import promql_parser
import pytest
import yaml
from openai import BadRequestError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests import make
from tests.deploy import compose
from tests.observability.conftest import PROCESSES, Observed
from worker.metrics import RelayMetrics, WorkerMetrics
from worker.relay import LOOPS

FOLDER = compose.ROOT / "deploy/observability"
OF_TARGETS = {"job": set(PROCESSES), "instance": set[str]()}  # what Prometheus adds to all that it is told
PROMETHEUS_OWN = {"up": OF_TARGETS, "ALERTS": {"alertname": set[str](), "alertstate": {"firing"}}}
Part = TypeVar("Part")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((FOLDER / "grafana/dashboards").glob("*.json"))]


def panels() -> Iterator[dict[str, Any]]:
    for dashboard in dashboards():
        yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def queries() -> Iterator[str]:
    yield from (alert["expr"] for alert in alerts())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


def parsed(query: str) -> promql_parser.Expr:
    return promql_parser.parse(query.replace("$__rate_interval", "5m"))


def parts_of(expression: promql_parser.Expr, kind: type[Part]) -> list[Part]:
    found = list[Part]()

    def visit(part: Any) -> bool:
        if isinstance(part, kind):
            found.append(part)
        return True

    promql_parser.walk(expression, visit)
    return found


def asked_for(query: str) -> list[promql_parser.VectorSelector]:
    return parts_of(parsed(query), promql_parser.VectorSelector)


def labels_of(told: dict[str, Metric], name: str) -> dict[str, set[str]]:
    """The labels of a metric's samples, each with the values that it was told with."""
    if name in PROMETHEUS_OWN:
        return PROMETHEUS_OWN[name]
    found = dict(OF_TARGETS)
    for sample in told[name].samples:
        for label, value in sample.labels.items():
            found[label] = found.get(label, set()) | {value}
    return found


@pytest.fixture(scope="module")
def told(observed: Observed, user: OpenAI, trained: FineTuningJob) -> dict[str, Metric]:
    """Every name that a sample may have, with its family: a model was trained and has answered, and one was asked too much."""
    with pytest.raises(BadRequestError):
        user.completions.create(model=make.TINY, prompt="a", max_tokens=100_000)
    families = [family for process in PROCESSES for family in text_string_to_metric_families(observed.metrics_of(process))]
    return {family.name + suffix: family for family in families for suffix in SUFFIXES.get(family.type, ())}


def test_every_query_can_be_parsed_and_names_something() -> None:
    for query in queries():
        assert asked_for(query), query


def test_everything_that_is_asked_for_is_told(told: dict[str, Metric]) -> None:
    names = {str(selector.name) for query in queries() for selector in asked_for(query)}

    assert names - PROMETHEUS_OWN.keys() - told.keys() == set()


def test_every_label_that_is_asked_for_is_told(told: dict[str, Metric]) -> None:
    for query in queries():
        for selector in asked_for(query):
            labels = labels_of(told, str(selector.name))
            for matcher in selector.matchers.matchers:
                assert matcher.name in labels, query
                assert matcher.op != promql_parser.MatchOp.Equal or matcher.value in labels[matcher.name], query
        for aggregation in parts_of(parsed(query), promql_parser.AggregateExpr):
            kept = set(aggregation.modifier.labels if aggregation.modifier else ())
            for selector in parts_of(aggregation.expr, promql_parser.VectorSelector):
                assert kept <= labels_of(told, str(selector.name)).keys(), query


def test_what_alerts_ask_of_a_relay_or_a_worker_is_told_before_anything_has_happened(tmp_path: Path) -> None:
    relay, worker = RelayMetrics(LOOPS), WorkerMetrics()
    worker.watch_disk(work=tmp_path)
    samples = [sample for of in (relay, worker) for family in of.registry.collect() for sample in family.samples]
    selectors = [selector for alert in alerts() for selector in asked_for(alert["expr"])]
    of_processes = [each for each in selectors if str(each.name).startswith(("tunesmith_relay_", "tunesmith_worker_"))]

    assert of_processes
    for selector in of_processes:
        wanted = {each.name: each.value for each in selector.matchers.matchers if each.op == promql_parser.MatchOp.Equal}
        assert any(each.name == selector.name and wanted.items() <= each.labels.items() for each in samples), selector


def test_whoever_is_told_of_is_shown(told: dict[str, Metric]) -> None:
    shown = {told[str(part.name)].name for query in queries() for part in asked_for(query) if str(part.name) in told}
    ours = {family.name for family in told.values() if family.name.startswith("tunesmith_")}

    assert ours - shown == set()


def test_alerts_say_what_is_wrong_and_how_bad_it_is() -> None:
    names = [alert["alert"] for alert in alerts()]

    assert len(set(names)) == len(names)
    for alert in alerts():
        assert alert["labels"]["severity"] in {"page", "warn"}
        assert alert["annotations"]["summary"]


def test_the_documentation_tells_of_every_alert_and_every_metric(told: dict[str, Metric]) -> None:
    text = (compose.ROOT / "docs/observability.md").read_text()

    for alert in alerts():
        assert f"`{alert['alert']}`" in text
    ours = {family.name + "_total" * (family.type == "counter") for name, family in told.items() if name.startswith("tunesmith_")}
    assert set(re.findall(r"`(tunesmith_\w+)`", text)) == ours


def test_prometheus_asks_every_service_where_it_answers() -> None:
    project = compose.load(compose.GPU)["services"]
    asked = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    ports = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in asked["scrape_configs"]}
    small = {name: int(project[name]["environment"]["TUNESMITH_METRICS__PORT"]) for name in ("relay", "cpu", "train")}

    assert ports == {"api": 8000, "engine": int(project["engine"]["environment"]["TUNESMITH_INFERENCE__PORT"]), **small}
    for job in asked["scrape_configs"]:
        assert job["dns_sd_configs"][0]["names"] == [job["job_name"]]
        assert ("authorization" in job) == ("metrics__token" in project[job["job_name"]]["secrets"])
    mounted = {volume.split(":")[1] for volume in project["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{file}" for file in asked["rule_files"]} <= mounted


def test_no_panel_covers_another() -> None:
    for dashboard in dashboards():
        cells = [cell for panel in dashboard["panels"] for cell in _cells(panel["gridPos"])]
        assert len(cells) == len(set(cells))
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_grafana_finds_the_data_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/tunesmith.yml").read_text())["providers"]
    mounted = {volume.split(":")[1] for volume in compose.load(compose.GPU)["services"]["grafana"]["volumes"]}

    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    assert provider["options"]["path"] in mounted


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    for x in range(place["x"], place["x"] + place["w"]):
        yield from ((x, y) for y in range(place["y"], place["y"] + place["h"]))
