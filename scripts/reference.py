"""Pages of docs/reference that are made from the code: chart values, metrics, conditions and labels."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "docs/reference"
VALUES = REPOSITORY / "charts/lockstep/values.yaml"
METRICS = {
    "Agents": REPOSITORY / "trainer/lockstep_trainer/agent/metrics.py",
    "Operator": REPOSITORY / "operator/lockstep_operator/metrics.py",
}
CONSTANTS = REPOSITORY / "crds/lockstep_api/constants.py"


def pages() -> dict[Path, str]:
    """File → content."""
    return {
        FOLDER / "values.md": values_page(VALUES.read_text()),
        FOLDER / "names.md": names_page(),
        FOLDER / "metrics.md": metrics_page(),
    }


def _header(source: Path) -> str:
    return f"<!-- Made from {source.relative_to(REPOSITORY)} by `make generate`; do not edit. -->\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# ------------------------------------------------------------------------------------------------- chart values


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the chart: its dotted path, its default as YAML, and the comment above it."""

    path: str
    default: str
    comment: str


def read_values(text: str) -> list[Value]:
    """The values in a values.yaml, in its order. A mapping with comments on its keys is a section, not a value."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return list(_walk(root, (), text.splitlines()))


def _walk(node: yaml.MappingNode, prefix: tuple[str, ...], lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = (*prefix, key.value)
        if isinstance(value, yaml.MappingNode) and not value.flow_style and not _comment(lines, key.start_mark.line):
            yield from _walk(value, path, lines)
            continue
        default = yaml.safe_dump(yaml.safe_load(yaml.serialize(value)), default_flow_style=True, width=1000)
        yield Value(".".join(path), default.removesuffix("...\n").strip(), _comment(lines, key.start_mark.line))


def _comment(lines: list[str], line: int) -> str:
    """The block of comment lines directly above a line."""
    block: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].lstrip().removeprefix("#").strip())
    return " ".join(block)


def values_page(text: str) -> str:
    """The reference of the chart's values."""
    lines = [
        _header(VALUES) + "# Values of the chart",
        "",
        "Wrong values are refused by `values.schema.json` with the place that is wrong.",
        "",
        _row("Value", "Default", "Meaning"),
        "|---|---|---|",
        *(_row(f"`{value.path}`", f"`{value.default}`", value.comment) for value in read_values(text)),
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- conditions and labels


def read_constants() -> dict[str, tuple[str, str]]:
    """Constant → (value, docstring below it), for the strings and numbers of ``lockstep_api.constants``."""
    from lockstep_api import constants

    found: dict[str, tuple[str, str]] = {}
    body = ast.parse(CONSTANTS.read_text()).body
    for statement, after in pairwise(body):
        match statement, after:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = (str(getattr(constants, name)), re.sub(r"\s+", " ", text).replace("``", "`"))
    return found


def names_page() -> str:
    """Conditions of a job, labels on its pods, ports and paths: what users and other tools may rely on."""
    known = read_constants()
    sections = {"Conditions": ("CONDITION_",), "Labels and annotations": ("LABEL_", "ANNOTATION_")}
    taken = {name for name in known if name.startswith(tuple(p for ps in sections.values() for p in ps))}
    lines = [_header(CONSTANTS) + "# Names"]
    for title, prefixes in sections.items():
        rows = [_row(f"`{value}`", text) for name, (value, text) in known.items() if name.startswith(prefixes)]
        lines += ["", f"## {title}", "", _row("Name", "Meaning"), "|---|---|", *rows]
    rows = [_row(f"`{value}`", text) for name, (value, text) in known.items() if name not in taken]
    lines += ["", "## Ports, paths and others", "", _row("Value", "Meaning"), "|---|---|", *rows]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as the code declares it. ``name`` is that of the series: a counter's ends in ``_total``."""

    name: str
    kind: str  # counter, gauge, histogram, summary or info
    labels: tuple[str, ...]
    text: str


def read_metrics(source: str) -> list[Metric]:
    """Metrics declared in Python with prometheus_client's classes, in the order of their names."""
    found = [_metric(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted({metric for metric in found if metric}, key=lambda metric: metric.name)


def _metric(call: ast.Call) -> Metric | None:
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    kind = called.removesuffix("MetricFamily").lower()
    if kind not in {"counter", "gauge", "histogram", "summary", "info"}:
        return None
    given = dict(zip(("name", "documentation", "labels"), call.args, strict=False))
    given |= {word.arg.replace("labelnames", "labels"): word.value for word in call.keywords if word.arg}
    try:
        name = ast.literal_eval(given["name"])
        text = " ".join(ast.literal_eval(given["documentation"]).split())
        labels = tuple(ast.literal_eval(given["labels"])) if "labels" in given else ()
    except (KeyError, ValueError):
        return None  # not a declaration with literal names
    suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
    return Metric(name.removesuffix(suffix) + suffix, kind, labels, text)


def metrics_page() -> str:
    """The reference of the metrics of agents and operator."""
    sources = " and ".join(str(path.relative_to(REPOSITORY)) for path in METRICS.values())
    lines = [
        f"<!-- Made from {sources} by `make generate`; do not edit. -->",
        "# Metrics",
        "",
        "OpenMetrics at `/metrics`, under the port name `metrics`. A scrape adds `namespace`, `pod` and, for agents, "
        "`lockstep_job`, the name of the job.",
    ]
    for title, path in METRICS.items():
        metrics = read_metrics(path.read_text()) if path.exists() else []
        rows = [
            _row(f"`{metric.name}`", metric.kind, " ".join(f"`{label}`" for label in metric.labels), metric.text)
            for metric in metrics
        ]
        lines += ["", f"## {title}", "", _row("Name", "Type", "Labels", "Meaning"), "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"
