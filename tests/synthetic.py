"""A made-up run's journal, for tests of what reads journals: seeded, no training behind it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

STEPS = 160
BEGIN = 1_790_000_000.0


def lines(seed: int = 0, steps: int = STEPS) -> list[dict[str, Any]]:
    """A run of ``steps`` steps with a worker killed at a third and a node lost at two thirds."""
    return list(_Run(seed, steps).lines())


def files(seed: int = 0, steps: int = STEPS) -> dict[str, bytes]:
    """The same as the objects below journal/: one per term."""
    terms: dict[str, list[str]] = {}
    for line in lines(seed, steps):
        key = f"journal/e{line['epoch']}-g{line['generation']}-0.jsonl"
        terms.setdefault(key, []).append(json.dumps(line))
    return {key: ("\n".join(texts) + "\n").encode() for key, texts in terms.items()}


class _Run:
    def __init__(self, seed: int, steps: int) -> None:
        self.random = random.Random(seed)
        self.steps = steps
        self.at = BEGIN
        self.term = (1, 1)
        self.ledger: dict[int, dict[str, float]] = {}

    def line(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "at": round(self.at, 3), "epoch": self.term[0], "generation": self.term[1], **fields}

    def spend(self, name: str, seconds: float) -> None:
        self.at += seconds
        classes = self.ledger.setdefault(self.term[0], {})
        classes[name] = classes.get(name, 0.0) + seconds * 4

    def lines(self) -> Iterator[dict[str, Any]]:
        third, two_thirds, every = self.steps // 3 + 2, 2 * self.steps // 3 + 3, max(2, self.steps // 12)
        yield self.line("membership", slots=_slots(0, "node-1"), cause="start of the job")
        self.spend("starting", 6.5)
        yield self.line("start", restore=None, phases={})
        yield from self.train(1, third, every, highest=0)
        yield self.line("fault", cause="WorkerExited", rung="process", witness="exit", slot=1, rank=3, exit_code=-9,
                        step=third, log_tail=["step 55 loss 4.37", "step 56 loss 4.41"])  # fmt: skip
        self.spend("detecting", 0.02)
        restored = third // every * every
        self.term = (1, 2)
        yield self.line("start", restore={"step": restored, "epoch": 1, "generation": 1}, phases={})
        self.spend("recovering", 1.9)
        yield self.line("recovered", seconds={"detect": 0.02, "decide": 0.1, "restart": 0.7, "restore": 0.6,
                        "first_step": 0.5, "recompute": 2.4}, steps_lost=third - restored)  # fmt: skip
        yield from self.train(restored + 1, two_thirds, every, highest=third)
        yield self.line("fault", cause="MemberLost", rung="pod", witness="stream", slot=1, step=two_thirds, log_tail=[])
        self.spend("detecting", 5.2)
        self.term = (2, 1)
        restored = two_thirds // every * every
        yield self.line("membership", slots=_slots(1, "node-3"), cause="node node-2 is not ready")
        self.spend("recovering", 6.1)
        yield self.line("start", restore={"step": restored, "epoch": 1, "generation": 2}, phases={})
        self.spend("recovering", 1.8)
        yield self.line("recovered", seconds={"detect": 5.2, "decide": 0.4, "restart": 5.8, "restore": 1.0,
                        "first_step": 0.7, "recompute": 3.0}, steps_lost=two_thirds - restored)  # fmt: skip
        yield from self.train(restored + 1, self.steps, every, highest=two_thirds)
        yield self.line("evaluate", step=self.steps, loss=3.42, tokens=65536, bigram_loss=4.05)
        yield self.line(
            "text", step=self.steps, prompt="def ", text="read(self, size=-1):\n    return self._fp.read(size)\n"
        )
        yield self.line("ledger", classes={k: round(v, 3) for k, v in self.ledger[self.term[0]].items()})
        yield self.line("finished", outcome="succeeded", reason="StepsDone", message="")

    def train(self, first: int, last: int, every: int, highest: int) -> Iterator[dict[str, Any]]:
        for step in range(first, last + 1):
            seconds = self.random.lognormvariate(math.log(0.55), 0.08)
            self.spend("recomputing" if step <= highest else "productive", seconds)
            # The loss of a step depends on the step alone: a step done again gives the same number.
            noise = random.Random(step).gauss(0, 0.05)
            yield self.line("step", step=step, loss=3.3 + 3.7 * math.exp(-step / 45) + noise, tokens=8192,
                            seconds=seconds, grad_norm=1.0, lr=1e-3, sections={"load": 0.01, "forward": seconds * 0.34,
                            "backward": seconds * 0.5, "optimizer": seconds * 0.12})  # fmt: skip
            if step % every == 0:
                self.spend("checkpoint stall", 0.25)
                term = f"step-{step}-e{self.term[0]}-g{self.term[1]}"
                yield self.line(
                    "checkpoint", step=step, manifest=f"{term}/manifest.json", seconds=0.25, bytes=18_400_000
                )
            if step % (every * 3) == 0:
                self.spend("evaluating", 0.6)
                yield self.line("evaluate", step=step, loss=3.4 + 3.7 * math.exp(-step / 45), tokens=32768)
            if step % 20 == 0:
                yield self.line("ledger", classes={k: round(v, 3) for k, v in self.ledger[self.term[0]].items()})


def _slots(incarnation: int, node: str) -> dict[str, dict[str, str]]:
    second = {"pod": f"demo-1-{incarnation}", "node": "node-2" if incarnation == 0 else node}
    return {"0": {"pod": "demo-0-0", "node": "node-1"}, "1": second}
