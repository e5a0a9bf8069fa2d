"""The run's journal as leaders write it: a step that an epoch goes on from has a line, and so has each fault.

Asked for is what a member's agent has told and lives to tell again. Streams here lose messages and let them overtake
each other, which TCP does not: what was said once and came too late or never is not asked for either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockstep_api.messages import StateId, Steps, Term

if TYPE_CHECKING:
    from simulation.agent import Agent


class Journal:
    """Lines of steps and faults, and what members have told of steps."""

    def __init__(self) -> None:
        self._lines: set[tuple[Term, int]] = set()
        self.faults: set[Term] = set()
        """Generations that a fault has ended, as leaders say it."""
        self._told: dict[tuple[Term, int], set[Agent]] = {}
        """Generation and step → agents."""
        self._under_way: set[tuple[Term, int, int]] = set()
        """Generation, slot and step of messages that have not arrived."""
        self._overtaken: set[tuple[Term, int]] = set()

    def write(self, line: dict[str, Any]) -> None:
        """A leader's line."""
        term = Term(line["epoch"], line["generation"])
        if line["kind"] == "step":
            self._lines.add((term, line["step"]))
        elif line["kind"] == "fault":
            self.faults.add(term)

    def said(self, message: Steps, agent: Agent) -> None:
        """A member sends this."""
        for done in message.done:
            self._told.setdefault((message.term, done.step), set()).add(agent)
            self._under_way.add((message.term, message.slot, done.step))

    def heard(self, message: Steps, newest: Term) -> None:
        """The leader, whose generation is ``newest``, gets it."""
        if not message.done:
            return
        first = message.done[0].step
        late = {each for each in self._under_way if each[:2] == (message.term, message.slot) and each[2] < first}
        self._overtaken.update((term, step) for term, _, step in late)
        arrived = {(message.term, message.slot, done.step) for done in message.done}
        self._under_way -= late | arrived
        if newest > message.term:  # that its sender is quiet came first
            self._overtaken.update((message.term, done.step) for done in message.done)

    def missing(self, state: StateId, since: int) -> list[int]:
        """Steps behind ``since`` up to ``state`` that nobody has written, and that leaders could know of."""
        term = Term(state.epoch, state.generation)
        excused = self._lines | self._overtaken | {(term, step) for term, _, step in self._under_way}
        wanted = [(term, step) for step in range(since + 1, state.step + 1)]
        known = [each for each in wanted if any(agent.alive for agent in self._told.get(each, ()))]
        return [step for term, step in known if (term, step) not in excused]
