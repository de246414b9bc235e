"""Alerts and dashboards are valid PromQL over metrics that the worker has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from streams.telemetry.metrics import Histogram, Metrics

DEPLOY = Path(__file__).parents[3] / "infra/deploy"
ALERTS: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/streamformer.json").read_text())
PANEL_EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [alert["expr"] for alert in ALERTS] + PANEL_EXPRESSIONS
HISTOGRAM_SERIES = ("_bucket", "_sum", "_count")


def series() -> dict[str, set[str]]:
    """Return every series of the catalogue with its labels."""
    named: dict[str, set[str]] = {}
    for metric in Metrics():
        if isinstance(metric, Histogram):
            named |= {metric.name + suffix: {*metric.labels, "le"} for suffix in HISTOGRAM_SERIES}
        else:
            named[metric.name] = set(metric.labels)
    return named


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_is_promql_over_known_series(expression: str) -> None:
    """The expression parses, and each series in it is one of the catalogue or Prometheus's own `up`."""
    promql_parser.parse(expression)
    assert set(re.findall(r"\b(?:streamformer_\w+|up\b)", expression)) <= {*series(), "up"}
    assert "streamformer_" in expression or "up{" in expression


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_groups_by_labels_that_its_series_have(expression: str) -> None:
    """`sum by (label)` names only labels of the series inside."""
    known = series()
    labels = {label for name in re.findall(r"streamformer_\w+", expression) for label in known[name]}
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    assert grouped <= labels


def test_the_parser_rejects_a_broken_expression() -> None:
    """The parser that the tests above rely on notices a broken expression."""
    with pytest.raises(ValueError, match="unclosed"):
        promql_parser.parse("sum(rate(streamformer_events_total[5m])")


def test_legends_and_summaries_name_labels_of_their_expression() -> None:
    """A label in a legend or summary is one that its expression keeps."""
    for text, expression in _texts():
        for label in re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text):
            kept = re.findall(rf"by \([^)]*\b{label}\b", expression)
            assert kept or ("by (" not in expression and "sum(" not in expression), f"{label} in {text!r}"


def test_panels_are_apart_and_use_the_provisioned_source() -> None:
    """Panels have distinct positions and ids, and all read the provisioned data source."""
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {provisioned[0]["uid"]}


def test_rules_are_loaded_and_each_has_severity_and_summary() -> None:
    """Prometheus loads the file of alerts, and every alert has a severity and a summary."""
    assert yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]


def _texts() -> Iterator[tuple[str, str]]:
    for alert in ALERTS:
        yield re.sub(r"\{\{ \$(value[^}]*|labels\.instance) \}\}", "", alert["annotations"]["summary"]), alert["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["legendFormat"], target["expr"]
