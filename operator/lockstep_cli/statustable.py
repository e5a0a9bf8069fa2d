"""A job's status as a table: what ``lockstep status`` prints and ``lockstep run`` ends with."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lockstep_api.v1alpha1 import TrainingJob, TrainingJobStatus
from lockstep_cli import times
from lockstep_cli.explain import failure
from lockstep_cli.journal import plain_class
from lockstep_cli.report.scale import duration, short

PHASE_STYLE = {"Running": "green", "Succeeded": "bold green", "Failed": "bold red", "Recovering": "yellow"}


def table(job: TrainingJob, now: float) -> Table:
    """Two columns: what, and its value."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows(job, now):
        grid.add_row(name, value)
    return grid


def rows(job: TrainingJob, now: float) -> list[tuple[str, str | Text]]:
    """The table's rows; those without a value are left out."""
    status = job.status
    phase = status.phase.value if status.phase else "unknown"
    style = PHASE_STYLE.get(phase, "cyan")
    ended = status.phase is not None and status.phase.terminal
    durable = status.checkpoint.durable
    pairs: list[tuple[str, str | Text]] = [
        ("job", f"{job.namespace}/{job.name}"),
        ("phase", Text(phase, style)),
        ("reason", failure(status)),
        ("members", "" if ended else f"{status.members.ready}/{job.spec.nodes} ready" + _spares(status)),
        ("progress", progress_line(status)),
        (
            "checkpoint",
            f"step {durable.step}, {times.ago(now - times.parse(durable.at))} ago  {durable.uri}" if durable else "",
        ),
        ("goodput", f"{status.goodput:.1%}" if status.goodput is not None else ""),
        ("GPU time", ledger_line(status)),
        ("restarts", restarts_line(status)),
        ("other data", status.progress.other_data or ""),
    ]
    return [(name, value) for name, value in pairs if value]


def progress_line(status: TrainingJobStatus) -> str:
    """step 41/100, loss 2.113, 12.3 k tokens/s."""
    progress = status.progress
    parts = [f"step {progress.step}/{progress.steps}" if progress.steps else f"step {progress.step}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.eval_loss is not None:
        parts.append(f"held-out {progress.eval_loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{short(progress.tokens_per_second)} tokens/s")
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu:.1%}")
    return ", ".join(parts) if progress.step else ""


def ledger_line(status: TrainingJobStatus) -> str:
    """The biggest classes of GPU time."""
    spent = sorted(((seconds, name) for name, seconds in status.ledger.items() if seconds > 0), reverse=True)
    return ", ".join(f"{plain_class(name)} {duration(seconds)}" for seconds, name in spent[:6])


def restarts_line(status: TrainingJobStatus) -> str:
    """Restarts by rung; empty where there were none."""
    restarts = status.restarts
    counts = (
        ("in-process", restarts.in_process),
        ("process", restarts.process),
        ("container", restarts.container),
        ("spare", restarts.spare),
        ("pod", restarts.pod),
    )
    return ", ".join(f"{count} {name}" for name, count in counts if count)


def _spares(status: TrainingJobStatus) -> str:
    members = status.members
    return (f", {members.spares} spare" if members.spares else "") + (
        f", {members.starting} starting" if members.starting else ""
    )
