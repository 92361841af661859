"""Dashboards and alert rules ask for metrics and labels that exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from support.promql import read_promql
from tandem.core.metrics import ExpertMetrics, GatewayMetrics, SupervisorMetrics, WorkerMetrics, merge, render

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "observability"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
SCRAPE_LABELS = {"job", "instance"}
"""What Prometheus adds."""


@cache
def exposed() -> dict[str, set[str]]:
    """Every series that a gateway or a supervisor serves at /metrics → its labels, read off what it writes."""
    texts = {}
    kinds = (
        ("decode-0", WorkerMetrics),
        ("decode-1", ExpertMetrics),
        ("gateway-0", GatewayMetrics),
        ("", SupervisorMetrics),
    )
    for worker, kind in kinds:
        registry = CollectorRegistry()
        for metric in vars(kind(registry)).values():
            if names := getattr(metric, "_labelnames", ()):  # it writes no line before it has a child
                metric.labels(*("x" for _ in names))
        texts[worker] = render(registry)
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(merge(texts)):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def problems(expression: str) -> Iterator[str]:
    """What an expression asks for that there is not."""
    spoken = read_promql(expression)
    known = SCRAPE_LABELS.copy()
    for metric, selected in spoken.metrics.items():
        labels = SCRAPE_LABELS if metric == "up" else exposed().get(metric)
        if labels is None:
            yield f"no metric {metric}"
            continue
        known |= labels
        for name, matcher in selected.items():
            if name not in labels | SCRAPE_LABELS:
                yield f"{metric} has no label {name}"
            value = matcher.split(" ", 1)[1]
            if name not in SCRAPE_LABELS | {"status"} and re.fullmatch(r"[\w|]+", value):
                for word in set(value.split("|")) - words():
                    yield f"nothing gives {metric} the {name} {word}"
    for label in spoken.grouping - known:
        yield f"none of {', '.join(spoken.metrics)} has the label {label}"


@cache
def words() -> set[str]:
    """All strings of the packages that count: labels' values are among them."""
    found = set()
    for package in ("core", "kv_transfer", "engine", "prefill", "decode", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_for_what_there_is(path: Path) -> None:
    board = json.loads(path.read_text())
    queries = [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            queries.append(target["expr"])
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            spoken = read_promql(target["expr"])
            shown = spoken.grouping or set().union(*(exposed()[metric] for metric in spoken.metrics))
            assert legend <= shown | {label for metric in spoken.metrics for label in exposed()[metric]}, panel["title"]
    assert [f"{query}: {problem}" for query in queries for problem in problems(query)] == []
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used <= variables


def test_alerts_ask_for_what_there_is() -> None:
    wrong = []
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"Tandem[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        wrong += [f"{rule['alert']}: {problem}" for problem in problems(rule["expr"])]
        # A label that the expression sums over is empty in the text.
        spoken = read_promql(rule["expr"])
        told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        kept = spoken.grouping if spoken.metrics.keys() != {"up"} else SCRAPE_LABELS
        wrong += [f"{rule['alert']}: its text names {label}" for label in told - kept]
    assert wrong == []
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)


def test_every_metric_is_shown_or_watched() -> None:
    """But those that say how the rest was counted."""
    spoken = set()
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                spoken |= read_promql(target["expr"]).metrics.keys()
    for rule in alerts():
        spoken |= read_promql(rule["expr"]).metrics.keys()
    series = re.compile(r"_(bucket|sum|count|total|created)$")
    forgotten = {series.sub("", name) for name in exposed()} - {series.sub("", name) for name in spoken}
    assert forgotten == {"tandem_hidden_state_files"}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("rate(tandem_request_total[5m])", "no metric tandem_request_total"),
        ("rate(tandem_requests[5m])", "no metric tandem_requests"),
        ('tandem_kv_blocks{stat="used"}', "no label stat"),
        ('tandem_kv_blocks{state="occupied"}', "the state occupied"),
        ('tandem_members{role=~"decode|colocatedd"}', "the role colocatedd"),
        ("sum by (roles) (tandem_members)", "the label roles"),
        ("sum(tandem_leases) / on (rank) tandem_leases", "the label rank"),
        ("label_values(tandem_leases, workers)", "the label workers"),
    ],
)
def test_a_renamed_metric_is_noticed(expression: str, found: str) -> None:
    assert found in "; ".join(problems(expression))


@pytest.mark.parametrize(
    "expression", ["sum(tandem_leases", "rat(tandem_leases[5m])", 'tandem_leases{worker"x"}', "a ? b"]
)
def test_what_is_not_promql_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"match|function|understood"):
        read_promql(expression)


def test_prometheus_loads_the_rules() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert all((FOLDER / name).is_file() for name in config["rule_files"])
    assert "tandem" in {job["job_name"] for job in config["scrape_configs"]}  # which the alert TandemDown names
