"""The check itself: every step of the lineage consumed its samples once, by the ranks whose part they were."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from awscrt.checksums import crc64nvme

from checker.chain import BrokenChainError, Link, read_chain
from checker.order import Order
from checker.stores import Objects

_MOST_PROBLEMS = 20
"""Beyond so many the rest says nothing new."""


@dataclass(frozen=True)
class Verdict:
    """What was found. A run is exact if there are no problems."""

    steps: int = 0  # on the lineage
    samples: int = 0  # consumed on the lineage
    states: int = 0  # committed ones
    recomputed: int = 0  # steps that the journal tells of more than once, in different terms
    terms: int = 0  # generations that did steps
    problems: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether no sample was lost, repeated or misplaced."""
        return not self.problems

    def __str__(self) -> str:
        if self.exact:
            return (
                f"exact: {self.samples} samples in {self.steps} steps on {self.states} committed states, none lost or "
                f"repeated; {self.recomputed} steps were done again after faults, in {self.terms} generations"
            )
        return "NOT exact:\n" + "\n".join(f"  {problem}" for problem in self.problems)


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)


def check(objects: Objects, *, steps: int | None = None, ended: bool = True) -> Verdict:
    """Checks the run whose objects these are; ``steps`` is how many it was to do. Not ``ended``: the run is to go on,
    and makes what the journal tells of beyond the newest committed state again."""
    try:
        chain = read_chain(objects)
    except BrokenChainError as error:
        return Verdict(problems=(str(error),))
    found = _Findings()
    consumed: Counter[int] = Counter()  # place in the global order → times
    done = 0
    for link in chain:
        lines, order = list(_samples(objects, link, found)), Order(link.rule)
        for step in range(done + 1, link.step + 1):
            own = [line for line in lines if line["step"] == step]
            consumed.update(_check_step(step, link, order, own, found))
        for line in lines:
            if not done < line["step"] <= link.step:
                found.add(f"{link.folder}: samples of step {line['step']}, but its steps are {done + 1} to {link.step}")
        done = link.step
    _check_counts(consumed, chain, found)
    if steps is not None and done != steps:
        found.add(f"the lineage ends at step {done}, not {steps}")
    recomputed, terms = _from_journal(objects, done if ended else None, found)
    return Verdict(done, sum(consumed.values()), len(chain), recomputed, terms, tuple(found.problems))


def _samples(objects: Objects, link: Link, found: _Findings) -> Iterator[dict[str, Any]]:
    """Lines of all ranks' sample logs of one state. Each log must be the one that was committed."""
    for rank in range(link.data_width):
        name = f"samples-r{rank}.jsonl"
        if name not in link.files:
            found.add(f"{link.folder}: the manifest does not list {name}")
            continue
        try:
            content = objects.read(f"{link.folder}/{name}")
        except KeyError:
            found.add(f"{link.folder}/{name} is missing")
            continue
        if (len(content), f"{crc64nvme(content):016x}") != link.files[name]:
            found.add(f"{link.folder}/{name} is not the one that was committed: size or checksum differ")
            continue
        for text in content.splitlines():
            line = json.loads(text)
            if line["rank"] != rank:
                found.add(f"{link.folder}/{name}: a line of rank {line['rank']}")
            if (line["epoch"], line["generation"]) > (link.epoch, link.generation):
                found.add(f"{link.folder}/{name}: step {line['step']} is of a newer generation than the state")
            yield line


def _check_step(step: int, link: Link, order: Order, lines: list[dict[str, Any]], found: _Findings) -> list[int]:
    """Places in the global order that the step consumed, where they are right; else a problem."""
    indices, expected = order.indices(step), order.of_step(step)
    share, rest = divmod(len(expected), link.data_width)
    if rest:
        found.add(f"{link.folder}: step {step} has {len(expected)} samples for {link.data_width} data-parallel ranks")
    places: list[int] = []
    for rank in range(link.data_width):
        own = [line for line in lines if line["rank"] == rank]
        if len(own) != 1:
            found.add(f"{link.folder}: step {step} stands {len(own)} times in the log of rank {rank}")
        for line in own:
            part = expected[rank * share : (rank + 1) * share]
            consumed = list(zip(line["sources"], line["samples"], strict=True))
            if consumed == part and line["first"] == indices[rank * share]:
                places += indices[rank * share : (rank + 1) * share]
            else:
                found.add(
                    f"{link.folder}: step {step}, rank {rank} consumed {consumed} from place {line['first']}, not "
                    f"{part} from {indices[rank * share]}"
                )
    if len({(line["epoch"], line["generation"]) for line in lines}) > 1:
        found.add(f"{link.folder}: ranks did step {step} in different generations")
    return places


def _check_counts(consumed: Counter[int], chain: list[Link], found: _Findings) -> None:
    """Every place in the global order once, over the whole lineage."""
    last = chain[-1]
    missing = sorted(set(range(last.drawn)) - set(consumed))
    repeated = sorted(place for place, times in consumed.items() if times > 1)
    if missing:
        found.add(f"{len(missing)} samples were lost, first at place {missing[0]}")
    if repeated:
        found.add(f"{len(repeated)} samples were consumed twice, the first at place {repeated[0]}")
    if any(link.rule != last.rule for link in chain):
        found.add("data, mix, seed or samples per step changed within the lineage")
    for link in chain:
        drawn = Order(link.rule).indices(link.step + 1).start
        if link.drawn != drawn:
            found.add(f"{link.folder}: it says that {link.drawn} samples were consumed, and its steps have {drawn}")


def _from_journal(objects: Objects, done: int | None, found: _Findings) -> tuple[int, int]:
    """(steps done again, generations that did steps), as the journal tells it; it may tell of none beyond ``done``."""
    terms: dict[int, set[tuple[int, int]]] = {}
    for key in objects.names():
        if not key.startswith("journal/"):
            continue
        for text in objects.read(key).splitlines():
            line = json.loads(text)
            if line["kind"] == "step":
                terms.setdefault(line["step"], set()).add((line["epoch"], line["generation"]))
    if not terms:
        return 0, 0
    beyond = sorted(step for step in terms if done is not None and step > done)
    if beyond:
        found.add(f"the journal tells of step {beyond[0]}, beyond the newest committed state at step {done}")
    return sum(len(each) - 1 for each in terms.values()), len(set().union(*terms.values()))
