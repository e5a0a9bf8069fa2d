"""Dashboards and alerts ask only for metrics that the code has, with labels that it gives them; the files are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import reference

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = REPOSITORY / "charts/lockstep/files"
DASHBOARDS = sorted((FILES / "dashboards").glob("*.json"))

SCRAPED = {"pod", "container", "node", "instance"}  # labels that a scrape adds


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """Series → its labels, from the code of agents and operator."""
    found: dict[str, set[str]] = {}
    for metric in [*reference.agent_metrics(), *reference.operator_metrics()]:
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            found[metric.name + suffix] = {*metric.labels, *(["le"] if suffix == "_bucket" else [])}
    assert len(found) > 15
    return found


def dashboard_queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield f"panel {panel['title']!r}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation {annotation['name']!r}", annotation["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']!r}", variable["query"]["query"]


def alert_queries() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']!r}", rule["expr"]


def selectors(query: str) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels that it is selected by) of each selector in a query."""
    for match in re.finditer(r"\b(lockstep_\w+)(?:\{([^}]*)\})?", query):
        yield match[1], set(re.findall(r"(\w+)\s*[=!]~?\s*\"", match[2] or ""))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_metrics_that_exist(path: Path, metrics: dict[str, set[str]]) -> None:
    queries = list(dashboard_queries(json.loads(path.read_text())))
    assert len(queries) > 10
    for place, query in queries:
        check(place, query, metrics)


def test_alerts_ask_for_metrics_that_exist(metrics: dict[str, set[str]]) -> None:
    queries = list(alert_queries())
    assert queries
    for place, query in queries:
        check(place, query, metrics)


def check(place: str, query: str, metrics: dict[str, set[str]]) -> None:
    asked = list(selectors(query))
    assert asked, f"{place}: no Lockstep metric in {query}"
    known_labels = set(SCRAPED)
    for name, labels in asked:
        assert name in metrics, f"{place}: no metric {name}"
        assert labels <= metrics[name] | SCRAPED, f"{place}: {name} has no label {labels - metrics[name] - SCRAPED}"
        known_labels |= metrics[name]
    for grouping in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", query):
        assert set(re.split(r",\s*", grouping)) <= known_labels, f"{place}: {grouping} is no label of {query}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_say_what_they_show(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert panel["description"]
        assert panel["targets"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    asked = {name for _, query in dashboard_queries(dashboard) for name in re.findall(r"\$(?!__)(\w+)", query)}
    assert asked | {"datasource"} == variables
