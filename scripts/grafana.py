"""Grafana's JSON of a dashboard, from a table of panels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. Its place follows from its order and its size, in columns and rows of Grafana's grid."""

    title: str
    description: str
    queries: dict[str, str]  # PromQL → legend
    kind: str = "timeseries"
    unit: str = "none"
    width: int = 12
    height: int = 8
    stacked: bool = False
    low: float | None = None
    high: float | None = None
    decimals: int | None = None
    thresholds: dict[float, str] = field(default_factory=dict)  # from this value on, this colour


def selector(metric: str, *matchers: str, **labels: str) -> str:
    """The series of a metric that have these labels, and that ``matchers``, in PromQL, choose."""
    return metric + "{" + ", ".join([*matchers, *(f'{name}="{value}"' for name, value in labels.items())]) + "}"


def figure(title: str, description: str, queries: dict[str, str], **options: Any) -> Panel:
    """One of the figures in a dashboard's first row, six of which fill it."""
    return Panel(title, description, queries, kind="stat", width=COLUMNS // 6, height=4, **options)


@dataclass(frozen=True, slots=True)
class Variable:
    """What a viewer chooses, from the values of a query."""

    name: str
    label: str
    query: str
    all: bool = False  # may be all of them, and is at first


def dashboard(
    uid: str,
    title: str,
    description: str,
    panels: Iterable[Panel],
    *,
    variables: Iterable[Variable],
    annotations: Iterable[Json] = (),
) -> Json:
    """The whole dashboard."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["lockstep"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels: a fault is seen in all of them
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [source, *map(_variable, variables)]},
        "annotations": {"list": [*annotations]},
        "panels": list(_placed(panels)),
    }


def _variable(variable: Variable) -> Json:
    every: Json = {"includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": variable.query, "refId": "A"},
        "refresh": 2,  # when the time range changes: jobs come and go
        "sort": 1,
        **(every if variable.all else {}),
    }


def annotation(name: str, query: str, text: str, colour: str) -> Json:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "iconColor": colour,
        "expr": query,
        "step": "10s",
        "titleFormat": name,
        "textFormat": text,
    }


def _placed(panels: Iterable[Panel]) -> Iterable[Json]:
    """Panels from left to right, then down."""
    column = row = tallest = 0
    for number, panel in enumerate(panels, start=1):
        if column + panel.width > COLUMNS:
            column, row, tallest = 0, row + tallest, 0
        yield {"id": number, "gridPos": {"x": column, "y": row, "w": panel.width, "h": panel.height}, **_panel(panel)}
        column, tallest = column + panel.width, max(tallest, panel.height)


def _panel(panel: Panel) -> Json:
    steps: list[Json] = [{"color": RED if panel.thresholds else BLUE, "value": None}]
    steps += [{"color": colour, "value": value} for value, colour in sorted(panel.thresholds.items())]
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    defaults |= {
        key: value
        for key, value in (("min", panel.low), ("max", panel.high), ("decimals", panel.decimals))
        if value is not None
    }
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 0 if panel.stacked else 2,
            "fillOpacity": 70 if panel.stacked else 8,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "showPoints": "never",
            "spanNulls": False,
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {"refId": chr(ord("A") + position), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            | ({"instant": True, "range": False} if panel.kind == "bargauge" else {})
            for position, (query, legend) in enumerate(panel.queries.items())
        ],
    }


def _options(panel: Panel) -> Json:
    newest = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case "stat":
            return {"reduceOptions": newest, "graphMode": "area", "colorMode": "value", "textMode": "value"}
        case "bargauge":
            return {"reduceOptions": newest, "orientation": "horizontal", "displayMode": "basic"}
        case _:
            legend = {"displayMode": "table", "placement": "right", "calcs": ["lastNotNull"]}
            many = any("{{" in legend for legend in panel.queries.values())
            return {
                "legend": legend if many else {"displayMode": "list", "placement": "bottom"},
                "tooltip": {"mode": "multi", "sort": "desc"},
            }
