"""What a leader computes for its members, by their number: the protocol's core alone, without network and JSON.

    python tests/bench/leader.py [--nodes 256 2048] [--write]

Each line is the CPU time that one thing takes which all members do: they join, a snapshot is staged and copied, all
ranks die at once. What a member costs should not depend on how many others there are; where it does, the second number
of nodes shows it. Of beats while an epoch forms, and of ticks, it is the share of a CPU: a beat a member and second,
ten ticks. ``--write`` adds the result to docs/results/leader.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench import results  # noqa: E402 - the path comes first
from lockstep_api.messages import (  # noqa: E402
    Beat,
    Copies,
    Inventory,
    Join,
    Membership,
    Origin,
    Quiesced,
    SlotInfo,
    Staged,
    StateId,
    Steps,
    StepSummary,
    Term,
    ToLeader,
    WorkerExited,
)
from lockstep_trainer.protocol import events  # noqa: E402
from lockstep_trainer.protocol.jobplan import JobPlan  # noqa: E402
from lockstep_trainer.protocol.leader import Leader  # noqa: E402

JOB, GPUS, SOME = "job", 8, 20
BEFORE = Term(1, 3)
"""The generation that a fault has ended: its snapshots are in all memories."""
LOG_TAIL = tuple("x" * 100 for _ in range(40))


class Members:
    """A leader of an epoch that recovers, and all its members, played."""

    def __init__(self, nodes: int) -> None:
        self.nodes, self.now = nodes, 1000.0
        slots = (
            SlotInfo(slot, f"job-{slot}-0", f"uid-{slot}", f"boot-{slot}", f"10.0.{slot // 250}.{slot % 250}:29400")
            for slot in range(nodes)
        )
        self.slots = tuple(slots)
        plan = JobPlan(JOB, nodes, GPUS, steps=10**6)
        self.leader = Leader(plan, Membership(JOB, 2, self.slots), None, self.now)
        self.leader.begin(self.now)

    def seconds(self, what: Callable[[], None]) -> float:
        """CPU time."""
        begun = time.process_time()
        what()
        return time.process_time() - begun

    def say(self, messages: Iterable[ToLeader]) -> float:
        """CPU seconds to hear them all; the clock stands still."""
        told = [events.MemberSaid(message.slot, message) for message in messages]
        return self.seconds(lambda: [self.leader.handle(event, self.now) for event in told] and None)

    def join(self) -> float:
        """All come with what their memories hold, and say that nothing runs."""
        joins = []
        for info in self.slots:
            here = Inventory(
                JOB, info.pod, info.pod_uid, info.boot_id, BEFORE, None, info.slot, None, 0, None, 1, 1,
                origin=Origin(BEFORE, 0), snapshots=self._copies(info.slot),
            )  # fmt: skip
            joins.append(events.MemberConnected(info.slot, Join(JOB, 2, info.slot, here)))
        seconds = self.seconds(lambda: [self.leader.handle(event, self.now) for event in joins] and None)
        quiet = (
            Quiesced(JOB, Term(2, 0), slot, Origin(BEFORE, 0), self._copies(slot), GPUS) for slot in range(self.nodes)
        )
        return seconds + self.say(quiet)

    def tick(self) -> float:
        """Of one."""
        self.now += 0.1
        return self.seconds(lambda: self.leader.handle(events.Tick(), self.now) and None)

    def start(self) -> float:
        """Chain and rendezvous store answer, and the generation starts."""
        told = (events.RestoreChosen(Term(2, 0), None), events.StoreReady("10.0.0.1", 29500))
        seconds = self.seconds(lambda: [self.leader.handle(event, self.now) for event in told] and None)
        assert self.leader.running is not None
        return seconds

    def _copies(self, slot: int) -> tuple[Copies, ...]:
        states = [StateId(step, BEFORE.epoch, BEFORE.generation) for step in (10, 20, 30)]
        own = [Copies(state, slot, 0, self.nodes) for state in states]
        return (*own, *(Copies(state, (slot - 1) % self.nodes, 0, self.nodes) for state in states[1:]))


def measure(nodes: int) -> dict[str, float]:
    """What → CPU seconds, once; shares of a CPU for beats and ticks."""
    members = Members(nodes)
    found = {"join": members.join()}
    found["beats while forming, share"] = members.say(Beat(JOB, Term(2, 0), slot) for slot in range(nodes))
    found["ticks while forming, share"] = 10 * sum(members.tick() for _ in range(SOME)) / SOME
    found["start"] = members.start()
    term = members.leader.term
    done = StepSummary(31, members.now, 1.0, 2.0, 100, 1.0, 0.1)
    found["step"] = members.say(Steps(JOB, term, slot, (done,), "forward") for slot in range(nodes))
    state = StateId(31, term.epoch, term.generation)
    found["snapshot"] = sum(
        members.say(Staged(JOB, term, slot, state, copied) for slot in range(nodes)) for copied in (False, True)
    )
    assert members.leader.keeping.snapshots.kept == state
    found["ticks of a generation, share"] = 10 * sum(members.tick() for _ in range(SOME)) / SOME
    exits = (
        WorkerExited(JOB, term, rank // GPUS, rank, 1, "RuntimeError: boom", False, LOG_TAIL, members.now)
        for rank in range(nodes * GPUS)
    )
    found["all ranks die"] = members.say(exits)
    return found


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--repeats", type=int, default=5, help="the least of so many counts (default: 5)")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    runs = {nodes: [measure(nodes) for _ in range(given.repeats)] for nodes in given.nodes}
    least = {nodes: {what: min(run[what] for run in found) for what in found[0]} for nodes, found in runs.items()}
    table = Table("CPU of the leader's core", *(f"{nodes:,} nodes" for nodes in given.nodes))
    for what in least[given.nodes[0]]:
        values = [least[nodes][what] for nodes in given.nodes]
        table.add_row(what, *(f"{value:.2%}" if what.endswith("share") else f"{value:.3f} s" for value in values))
    Console().print(table)
    if given.write:
        origin = results.origin("CPU time of the leader's core", f"Python {sys.version.split()[0]}")
        results.add({**origin, "nodes": least}, results.RESULTS / "leader.json")


if __name__ == "__main__":
    main()
