"""Everything that a seed decides, and everything that there is."""

from __future__ import annotations

from typing import Any, TypeVar

from lockstep_api.wire import decode, encode
from lockstep_trainer.protocol.jobplan import JobPlan
from lockstep_trainer.protocol.policy import Ladder, RetryRule
from lockstep_trainer.protocol.progress import HangBounds
from simulation.agent import JOB, Agent
from simulation.clockwork import Clockwork, Network
from simulation.invariants import Invariants
from simulation.operator import Operator
from simulation.pods import Pod
from simulation.storage import SimulatedStore
from simulation.workers import Workers

CRASH_CHANCE = 0.0003
"""Of an agent's death before any one effect."""
CODED = 11
"""Every eleventh seed: what has no common factor with the other choices that are made by it."""
Sent = TypeVar("Sent")


def outages(seed: int) -> bool:
    """Whether members are lost while the store is away for long, with time to train in between."""
    return seed % 16 == 11


def widths(seed: int) -> bool:
    """Whether there is room now for fewer nodes and now for more, again and again: most of its epochs begin from states
    that another number of nodes has made."""
    return seed % 16 == 5


class World:
    """Everything."""

    def __init__(self, seed: int, *, nodes: int = 3, gpus: int = 1, steps: int = 10_000, every: int | None = 6) -> None:
        self.clockwork = Clockwork(seed)
        self.random = self.clockwork.random
        self.network = Network(self.clockwork)
        self.seed = seed
        self.steps = steps
        self.coded = seed % CODED == CODED - 1
        """All messages and memories go through the real codecs."""
        self._numbers = 0
        self.effects_to_crash = 0
        """After so many effects an agent dies between two of them."""
        self.crashes()
        self.gives_up = seed % 4 < 2
        """Whether workers end, or begin from the store at once, where a copy does not verify."""
        self.replays = seed % 5 == 2
        """Steps are replayed, and who computes wrong numbers is put aside."""
        self.disputes = seed % 15 == 12
        """And nobody can say which of two ranks does."""
        self.outages = outages(seed)
        self.widths = widths(seed)
        # Faults come at will: none is to be taken for a loop.
        self.plan = JobPlan(
            JOB, nodes, gpus, steps, checkpoint_every=every, memory_buddy=seed % 5 != 1,
            ladder=Ladder(process_budget=1000, script=True, rules=(RetryRule("Restart"),)),
            rollback=self.replays, spares=1,
            hang=HangBounds(factor=5.0, minimum_seconds=8.0, first_step_seconds=20.0),
        )  # fmt: skip
        self.invariants = Invariants(self)
        self.store = SimulatedStore(
            self.clockwork, nodes_of=self.invariants.nodes_of, on_commit=self.invariants.committed
        )
        self.store.forgetful = seed % 13 == 4
        self.workers = Workers(self)
        self.pods: dict[str, Pod] = {}
        self.by_address: dict[str, Pod] = {}
        self.incarnations = dict.fromkeys(range(nodes), -1)
        self.status: dict[str, Any] = {"epoch": 0, "slots": {}, "version": 0}  # what the API server keeps
        self.room = True
        """New pods find a node."""
        self._current: list[Pod] = []
        for ordinal in range(nodes):
            self.new_pod(ordinal)
        self.operator = Operator(self)

    def number(self) -> int:
        """Never the same twice."""
        self._numbers += 1
        return self._numbers

    def crashes(self) -> bool:
        """True where the agent that carries out effects is to die now; the next one's turn is drawn."""
        self.effects_to_crash = 1 + int(self.random.expovariate(CRASH_CHANCE))
        return self.network.faulty

    def on_the_wire(self, message: Sent) -> Sent:
        """As it arrives at the other end. Messages can't change, so that most worlds spare the JSON."""
        return decode(encode(message)) if self.coded else message  # type: ignore[arg-type, return-value]

    def new_agent(self, pod: Pod) -> Agent:
        """A new agent process of a pod."""
        return Agent(pod)

    def new_pod(self, ordinal: int) -> Pod:
        """The next incarnation."""
        self.incarnations[ordinal] += 1
        pod = Pod(self, ordinal, self.incarnations[ordinal])
        self.pods[pod.name] = pod
        self.by_address[pod.address] = pod
        self._current = [*self._current[:ordinal], pod, *self._current[ordinal + 1 :]]
        return pod

    def make_room(self) -> None:
        """Pods that waited for a node get one."""
        self.room = True
        for pod in self._current:
            if pod.exists and not pod.scheduled:
                pod.scheduled = True
                pod.power_on()

    def current_pods(self) -> list[Pod]:
        """The newest of each ordinal."""
        return self._current

    def members(self) -> set[str]:
        """Uids of the pods that hold a slot."""
        return {info.pod_uid for info in self.status["slots"].values()}
