"""Writes a line per evaluation, and one when the loss jumps."""

import json
from pathlib import Path

from lockstep_trainer.callbacks import Callback, Evaluation, Outcome, Run, Step
from lockstep_trainer.errors import UserError


class Diary(Callback):
    """`callbacks: [{module: owncallback:Diary, options: {file: /tmp/diary.jsonl}}]`"""

    def __init__(self, *, file: str, jump: float = 1.0) -> None:
        if not Path(file).is_absolute():
            raise UserError(f"trainer.callbacks: file of Diary is {file!r}; give an absolute path")
        self.file, self.jump = Path(file), jump
        self.last: float | None = None

    def on_start(self, run: Run) -> None:
        self._write(kind="start", uid=run.uid, step=run.step)

    def on_step(self, step: Step) -> None:
        if self.last is not None and step.loss > self.last + self.jump:
            self._write(kind="jump", step=step.step, loss=step.loss)
        self.last = step.loss

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self._write(kind="evaluation", step=evaluation.step, loss=evaluation.loss)

    def on_end(self, outcome: Outcome) -> None:
        self._write(kind="end", outcome=outcome)

    def _write(self, **line: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
