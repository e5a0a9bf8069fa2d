"""What ``lockstep run`` shows while a job runs: a view that redraws itself, or plain lines without a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lockstep_api.constants import CONDITION_CHECKPOINT_DEGRADED
from lockstep_api.v1alpha1 import Phase, TrainingJob, TrainingJobStatus
from lockstep_cli import statustable, times
from lockstep_cli.report.scale import clock
from lockstep_operator.plan.story import describe

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class History:
    """What the view remembers of earlier statuses."""

    started: float
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=48))
    step: int = 0

    def add(self, status: TrainingJobStatus) -> None:
        """Takes in a new status."""
        progress = status.progress
        if progress.loss is not None and progress.step != self.step:
            self.losses.append(progress.loss)
            self.step = progress.step


def view(job: TrainingJob, history: History, now: float) -> RenderableType:
    """The job's present state as a few lines."""
    status = job.status
    phase = status.phase.value if status.phase else "Pending"
    steps = status.progress.steps or (job.spec.trainer.recipe.steps if job.spec.trainer else 0)
    head = Table.grid(padding=(0, 2), expand=True)
    for ratio in (None, None, 1, None):
        head.add_column(ratio=ratio, no_wrap=True)
    head.add_row(
        Text(job.name, style="bold"),
        Text(phase, style=statustable.PHASE_STYLE.get(phase, "cyan")),
        ProgressBar(total=steps or 1, completed=status.progress.step),
        Text(clock(now - history.started), style="dim"),
    )
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(overflow="fold")
    rows = dict(statustable.rows(job, now))
    for name in ("progress", "members", "checkpoint", "goodput", "restarts", "other data"):
        if name in rows:
            body.add_row(f"  {name}", rows[name])
    if len(history.losses) > 2:
        body.add_row("  loss", Text(sparkline(list(history.losses)), style="blue"))
    for fault in status.faults[-4:]:
        at = clock(times.parse(fault.at) - history.started)
        body.add_row(f"  fault {at}", Text(describe(fault, status), style="yellow"))
    return Group(head, body)


def sparkline(values: list[float]) -> str:
    """One character per value, from lowest to highest."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((value - low) * scale)] for value in values)


class Lines:
    """Plain lines for a log: what changed, and how far it is every few seconds."""

    def __init__(self, say: Callable[[str], None], started: float, every: float = 5.0) -> None:
        self._say, self._started, self._every = say, started, every
        self._phase: Phase | None = None
        self._faults: set[tuple[int, int, str]] = set()
        self._degraded = ""
        self._other_data: str | None = None
        self._said_at = 0.0

    def show(self, status: TrainingJobStatus, now: float) -> None:
        """Says what is new."""
        stamp = clock(now - self._started)
        for fault in status.faults:
            key = (fault.epoch, fault.generation, fault.cause)
            # A fault is told once, when its price is known, or will not be: another came first, or the job's end.
            over = fault is not status.faults[-1] or (status.phase is not None and status.phase.terminal)
            if key not in self._faults and (fault.steps_lost is not None or over):
                self._faults.add(key)
                self._say(f"{stamp}  fault: {describe(fault, status)}")
        if status.phase and status.phase != self._phase:
            self._phase = status.phase
            self._say(f"{stamp}  {status.phase.value}")
        degraded = next(
            (c.message for c in status.conditions if c.type == CONDITION_CHECKPOINT_DEGRADED and c.status == "True"), ""
        )
        if degraded != self._degraded:
            self._degraded = degraded
            self._say(f"{stamp}  {'checkpoints wait: ' + degraded if degraded else 'checkpoints are durable again'}")
        if status.progress.other_data != self._other_data:
            self._other_data = status.progress.other_data
            self._say(f"{stamp}  trained on other data {self._other_data}")
        progress = statustable.progress_line(status)
        if progress and now - self._said_at >= self._every and status.phase == Phase.RUNNING:
            self._said_at = now
            durable = status.checkpoint.durable
            kept = f", checkpoint {durable.step}" if durable else ""
            self._say(f"{stamp}  {progress}{kept}")
