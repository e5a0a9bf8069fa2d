"""Puts a report together: one HTML file that needs no network and no other file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources

from lockstep_cli.journal import Journal
from lockstep_cli.report import charts, sections


@dataclass(frozen=True, slots=True)
class Heading:
    """What a report is about."""

    job: str
    source: str  # where the journal was read
    phase: str | None = None  # of the TrainingJob, where it is known


def render(journal: Journal, heading: Heading, ledger: dict[str, float] | None = None) -> str:
    """The report as HTML. ``ledger`` is the job's own, which also counts pods and spares; else the journal's."""
    classes = ledger or journal.ledger
    state = heading.phase or {"succeeded": "Succeeded", "failed": "Failed", "stopped": "Stopped"}.get(
        journal.outcome or "", "Running"
    )
    began = datetime.fromtimestamp(journal.begin, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if journal.begin else "not yet"
    hover = json.dumps(
        {"span": max(journal.end - journal.begin, 1e-9), "steps": charts.hover_data(journal)}, separators=(",", ":")
    )
    said = [journal.message] if journal.message else []
    said += [f"Trained on other data up to step {one.step}: {one.message}" for one in journal.other_data]
    message = "".join(f'<p class="message">{escape(each)}</p>' for each in said)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(heading.job)} · Lockstep</title><style>{_asset("report.css")}</style></head><body><main>
<header><h1>{escape(heading.job)} <span class="badge {escape(state.lower())}">{escape(state)}</span></h1>
<p class="dim">began {began}</p>{message}</header>
<section class="cards">{sections.figures(journal, classes)}</section>
<section class="charts">{charts.loss(journal)}<p class="legend">{_loss_legend(journal)}</p>
{charts.step_time(journal)}{charts.tokens(journal)}{charts.members(journal)}<div id="readout" hidden></div></section>
<section><h2>Where the time went</h2>{sections.ledger_section(classes)}</section>
<section><h2>Faults</h2>{sections.fault_section(journal)}</section>
<section>{sections.suspension_section(journal)}</section>
<section>{sections.step_section(journal)}</section>
<section class="columns"><div><h2>Checkpoints</h2>{sections.checkpoint_section(journal)}</div>
<div>{sections.evaluation_section(journal)}</div></section>
<section>{sections.text_section(journal)}</section>
<footer class="dim">Made by Lockstep from the journal in <code>{escape(heading.source)}</code></footer>
</main><script type="application/json" id="data">{hover}</script>
<script>{_asset("report.js")}</script></body></html>
"""


def _loss_legend(journal: Journal) -> str:
    keys = [("line new", "training loss")]
    if journal.recomputed:
        keys.append(("line again", "steps done again"))
    if journal.evaluations:
        keys.append(("held-out", "held-out loss"))
    if journal.faults:
        keys.append(("recovery", "fault until first new step"))
    if journal.suspensions:
        keys.append(("suspension", "suspended"))
    if journal.checkpoints:
        keys.append(("checkpoint", "durable checkpoint"))
    return "".join(f'<span class="key"><span class="mark {css}"></span>{name}</span>' for css, name in keys)


def _asset(name: str) -> str:
    return resources.files("lockstep_cli.report").joinpath("assets", name).read_text()
