"""The Grafana dashboards of the chart, as tables of panels; `make generate` writes their JSON.

All queries select one job by the variables ``$namespace`` and ``$job``. The operator's series span the job's life; an
agent's (the leader's) begin anew when another pod leads, so queries of them take the maximum over pods.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
JOB_DASHBOARD = REPOSITORY / "charts/lockstep/files/dashboards/job.json"
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


def of_job(metric: str, **labels: str) -> str:
    """A selector for one job's series."""
    chosen = {"namespace": "$namespace", "job_name": "$job", **labels}
    return metric + "{" + ", ".join(f'{name}="{value}"' for name, value in chosen.items()) + "}"


AGE = f"time() - max({of_job('lockstep_job_checkpoint_timestamp_seconds')})"
LEDGER = f"max by (class) ({of_job('lockstep_job_ledger_gpu_seconds')})"

JOB = (
    Panel(
        "Step",
        "Optimizer steps done.",
        {f"max({of_job('lockstep_job_step')})": "step"},
        kind="stat",
        width=4,
        height=4,
        decimals=0,
    ),
    Panel(
        "Loss",
        "Mean training loss of the newest step, in nats per token.",
        {f"max({of_job('lockstep_loss_nats')})": "loss"},
        kind="stat",
        width=4,
        height=4,
        decimals=3,
    ),
    Panel(
        "Goodput",
        "Productive share of GPU time; queued and suspended time is left out.",
        {f"max({of_job('lockstep_job_goodput_ratio')})": "goodput"},
        kind="stat",
        unit="percentunit",
        width=4,
        height=4,
        decimals=1,
        thresholds={0.9: YELLOW, 0.95: GREEN},
    ),
    Panel(
        "Members ready",
        "Share of the members that hold a slot and are connected.",
        {f"max({of_job('lockstep_job_members_ready')}) / max({of_job('lockstep_job_nodes')})": "ready"},
        kind="stat",
        unit="percentunit",
        width=4,
        height=4,
        decimals=0,
        thresholds={1.0: GREEN},
    ),
    Panel(
        "Restarts",
        "Faults answered so far, on all rungs of the ladder.",
        {f"sum(max by (rung) ({of_job('lockstep_job_restarts')}))": "restarts"},
        kind="stat",
        width=4,
        height=4,
        decimals=0,
    ),
    Panel(
        "Checkpoint age",
        "Time since the newest durable checkpoint was committed: what the loss of all nodes would cost.",
        {AGE: "age"},
        kind="stat",
        unit="s",
        width=4,
        height=4,
        decimals=0,
    ),
    Panel(
        "Loss",
        "In nats per token: training loss of the newest step, and loss on the held-out files.",
        {
            f"max({of_job('lockstep_loss_nats')})": "training",
            f"max({of_job('lockstep_eval_loss_nats')})": "held out",
        },
    ),
    Panel(
        "Throughput",
        "Tokens per second over all GPUs.",
        {f"max({of_job('lockstep_tokens_per_second')})": "tokens/s"},
        low=0,
    ),
    Panel(
        "Step time",
        "Wall time of the newest step.",
        {f"max({of_job('lockstep_step_seconds')})": "step"},
        unit="s",
        low=0,
    ),
    Panel(
        "Where a step's time goes",
        "Seconds of the newest step in each section of the training loop, mean over the workers.",
        {f"max by (section) ({of_job('lockstep_section_seconds')})": "{{section}}"},
        unit="s",
        stacked=True,
        low=0,
    ),
    Panel(
        "Model FLOPs utilisation",
        "FLOPs that the model's formula counts, as a share of the devices' peak. No data where the peak is not known.",
        {f"max({of_job('lockstep_mfu_ratio')})": "MFU"},
        unit="percentunit",
        low=0,
        high=1,
    ),
    Panel(
        "Device memory",
        "Memory in use at most during the newest step, on the rank that used most.",
        {f"max({of_job('lockstep_device_memory_bytes')})": "in use"},
        unit="bytes",
        low=0,
    ),
    Panel(
        "Goodput",
        "Productive share of GPU time since the job's start.",
        {f"max({of_job('lockstep_job_goodput_ratio')})": "goodput"},
        unit="percentunit",
        low=0,
        high=1,
        width=8,
    ),
    Panel(
        "Restarts by rung",
        "How faults were answered: in the process, the container, by a spare, by a new pod.",
        {f"max by (rung) ({of_job('lockstep_job_restarts')})": "{{rung}}"},
        low=0,
        decimals=0,
        width=8,
    ),
    Panel(
        "Checkpoint age",
        "Falls to zero at each commit; a line that only rises means that checkpoints don't become durable.",
        {AGE: "age"},
        unit="s",
        low=0,
        width=8,
    ),
    Panel(
        "Ledger",
        "GPU-seconds since the job's start, each in exactly one class.",
        {LEDGER: "{{class}}"},
        unit="s",
        stacked=True,
        low=0,
        width=16,
        height=9,
    ),
    Panel(
        "Ledger, now",
        "The same, so far.",
        {f"sort_desc({LEDGER} > 0)": "{{class}}"},
        kind="bargauge",
        unit="s",
        width=8,
        height=9,
        decimals=0,
    ),
    Panel(
        "Faults by cause",
        "Faults judged in the shown time, by cause and by the rung that answered them.",
        {
            f"sum by (cause, rung) (max_over_time({of_job('lockstep_faults_total')}[$__range]))": "{{cause}}, {{rung}}",
        },
        kind="bargauge",
        width=24,
        height=6,
        decimals=0,
    ),
)

FAULTS = f"max by (rung) (delta({of_job('lockstep_job_restarts')}[30s])) > 0"
"""True for half a minute after each restart: one mark, at any scrape interval up to 15 s."""


def job_dashboard() -> Json:
    """The dashboard of one job."""
    return {
        "uid": "lockstep-job",
        "title": "Lockstep / Job",
        "description": "One training run: how it learns, how fast, what broke, and where the GPU time went.",
        "tags": ["lockstep"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels: a fault is seen in all of them
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables())},
        "annotations": {"list": [_annotation("Faults", FAULTS, "answered by: {{rung}}", RED)]},
        "panels": list(_placed(JOB)),
    }


def _variables() -> Iterable[Json]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, label, query in (
        ("namespace", "Namespace", "label_values(lockstep_job_step, namespace)"),
        ("job", "Job", 'label_values(lockstep_job_step{namespace="$namespace"}, job_name)'),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": "A"},
            "refresh": 2,  # when the time range changes: jobs come and go
            "sort": 1,
        }


def _annotation(name: str, query: str, text: str, colour: str) -> Json:
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


def files() -> dict[Path, str]:
    """File → content."""
    return {JOB_DASHBOARD: json.dumps(job_dashboard(), indent=2, ensure_ascii=False) + "\n"}
