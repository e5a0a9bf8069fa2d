"""Which samples a data-parallel rank has consumed since the newest durable state."""

from __future__ import annotations

import json
from pathlib import Path

from lockstep_api.messages import StateId, Term
from lockstep_trainer.checkpoint.snapshots import read_state


class SampleLog:
    """Lines by step. A snapshot carries those that no durable state has yet."""

    def __init__(self, durable: Path, term: Term) -> None:
        """``durable``: the file in which the agent says which state is durable; ``term``: of this generation."""
        self._durable, self._term = durable, term
        self._restored = 0
        self._root = term
        self._lines: list[tuple[int, str]] = []
        self.since = 0
        """The step that the lines begin behind."""

    def restored(self, step: int) -> None:
        """Begin behind a durable state."""
        self._restored = self.since = step
        self._lines = []

    def recalled(self, step: int, since: int, text: str, root: Term) -> None:
        """Go on with the log of a snapshot of ``step``; ``root``: the term that began it from a durable state."""
        self._restored, self.since, self._root = step, since, root
        self._lines = [(json.loads(line)["step"], line) for line in text.splitlines() if line]

    def add(self, step: int, line: str) -> None:
        """What ``step`` consumes, before it does."""
        self._lines.append((step, line))

    def text(self) -> str:
        """All lines beyond the newest durable state; what is durable is forgotten."""
        state = read_state(self._durable)
        if state is not None and state.step > self.since and self._is_ours(state):
            self.since = state.step
            self._lines = [(step, line) for step, line in self._lines if step > state.step]
        return "".join(f"{line}\n" for _, line in self._lines)

    def _is_ours(self, state: StateId) -> bool:
        """This generation made it or descends from it. What is older than the root is no ancestor beyond ``since``:
        the ranks passed over it."""
        made = Term(state.epoch, state.generation)
        return made == self._term or (made >= self._root and state.step <= self._restored)
