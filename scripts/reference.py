"""Pages of docs/reference that are made from the code: chart values, names, metrics, the command line."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from prometheus_client.metrics_core import Metric as Family

from lockstep_api import constants
from lockstep_api.v1alpha1 import TrainingJob
from lockstep_operator.plan.nodes.records import Exclusion, NodeRecord

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "docs/reference"
VALUES = REPOSITORY / "charts/lockstep/values.yaml"
CONSTANTS = REPOSITORY / "crds/lockstep_api/constants.py"


def pages() -> dict[Path, str]:
    """File → content."""
    return {
        FOLDER / "values.md": values_page(VALUES.read_text()),
        FOLDER / "names.md": names_page(),
        FOLDER / "metrics.md": metrics_page(),
        FOLDER / "cli.md": cli_page(),
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
    """A metric as the code has it. ``name`` is that of the series, but for a histogram's suffixes."""

    name: str
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...]
    text: str


JOB_LABELS = ("namespace", "job_name")


def agent_metrics() -> list[Metric]:
    """What an agent exposes."""
    from lockstep_trainer.agent.metrics import LABELS, NAMES, OF_PODS

    return [
        Metric(
            name,
            "counter" if name.endswith("_total") else "gauge",
            (*JOB_LABELS, *(["pod"] if name.startswith(OF_PODS) else []), *LABELS.get(name, ())),
            text.rstrip("."),
        )
        for name, text in NAMES.items()
    ]


def operator_metrics() -> list[Metric]:
    """What the operator exposes, asked of the operator's own registry with one job of which everything is known."""
    from lockstep_operator.metrics import OperatorMetrics

    metrics = OperatorMetrics(lambda: [_job()], lambda: 0.0, _Nodes())
    metrics.reconciled(_job(), 0.1, ValueError())
    return [_metric(family) for family in metrics.registry.collect()]


def _metric(family: Family) -> Metric:
    series = [sample for sample in family.samples if not sample.name.endswith("_created")]
    name = series[0].name if family.type == "counter" else family.name
    labels = tuple(label for label in series[0].labels if label != "le")
    return Metric(name, family.type, labels, family.documentation)


class _Nodes:
    """One node, excluded."""

    held = ""

    @property
    def records(self) -> dict[str, NodeRecord]:
        return {"any": NodeRecord(exclusion=Exclusion(0.0, "score", ""))}

    def excluded(self) -> frozenset[str]:
        return frozenset({"any"})


def _job() -> TrainingJob:
    return TrainingJob.model_validate(
        {
            "metadata": {"name": "any", "namespace": "any", "uid": "any"},
            "spec": {"nodes": 1, "gpusPerNode": 1, "command": ["true"]},
            "status": {
                "phase": "Running",
                "goodput": 1.0,
                "ledger": {"productive": 1.0},
                "checkpoint": {"durable": {"step": 1, "uri": "any", "at": "2026-01-01T00:00:00Z"}},
            },
        }
    )


def metrics_page() -> str:
    """The reference of the metrics of agents and operator."""
    lines = [
        "<!-- Made from the metrics modules of agent and operator by `make generate`; do not edit. -->",
        "# Metrics",
        "",
        "OpenMetrics at `/metrics`, under the port name `metrics`: agents at port 29401, the operator at 8080. What is "
        "said of a job has the labels `namespace` and `job_name`. Training metrics come from the agent that leads.",
    ]
    for title, metrics in (("Agents", agent_metrics()), ("Operator", operator_metrics())):
        rows = [
            _row(f"`{metric.name}`", metric.kind, " ".join(f"`{label}`" for label in metric.labels), metric.text)
            for metric in sorted(metrics, key=lambda metric: metric.name)
        ]
        lines += ["", f"## {title}", "", _row("Name", "Type", "Labels", "Meaning"), "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------- command line


def cli_page() -> str:
    """The reference of ``lockstep``, from its parser. Only what is the same in every Python's argparse is used."""
    from lockstep_cli import __main__ as cli

    lines = [
        "<!-- Made from the parser of operator/lockstep_cli by `make generate`; do not edit. -->",
        "# Command line",
        "",
        "`lockstep`, or `kubectl lockstep`. Exit status: 0 done, 1 an error, said in one sentence on standard error, "
        "2 a wrong manifest or wrong usage, 130 Ctrl-C, 141 whoever read the output went away, 143 "
        "SIGTERM. Every command works without a terminal.",
    ]
    return "\n".join([*lines, *_command_lines("lockstep", cli.parser())]) + "\n"


def _command_lines(prefix: str, parser: argparse.ArgumentParser) -> list[str]:
    """A section for each command of ``parser``, or for each command of a command, and for itself where it is one."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help for choice in commands._choices_actions}
    lines = []
    for name, command in commands.choices.items():
        inner = next((one for one in command._actions if isinstance(one, argparse._SubParsersAction)), None)
        if inner and inner.required:
            lines += _command_lines(f"{prefix} {name}", command)
            continue
        own = [action for action in command._actions if action is not inner and action.dest != "help"]
        rows = [_row(f"`{_spelling(action)}`", _meaning(action)) for action in own]
        summary = summaries.get(name) or ""
        text = command.description or f"{summary[:1].upper()}{summary[1:]}."
        lines += ["", f"## {prefix} {name}", "", text, "", _row("Argument", "Meaning"), "|---|---|", *rows]
        if inner:
            lines += _command_lines(f"{prefix} {name}", command)
    return lines


def _spelling(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"[{value}]" if action.nargs in ("?", "*") else str(value)
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def _meaning(action: argparse.Action) -> str:
    values = {key: value for key, value in vars(action).items() if isinstance(value, str | int | float | Path)}
    return (action.help or "") % values
