"""Who waits for whom in a step: from each rank's own work to its waiting and to the step's time.

1. A rank begins when it has its batch. Its own work, computing and what its host is late with, is spread over the
   step's micro-batches.
2. Tensor ranks meet in each micro-batch: each waits for the last one, then all spend the transfer.
3. A stage computes a micro-batch's forward when the stage before it has done and sent it, its backward when the
   stage after it has; a third of the work is forward, and the order is that of one forward, one backward (Narayanan
   et al. 2021, "1F1B"). What a stage waits for its neighbours is in ``pipeline``, the bubble included.
4. After the last backward, the ranks that differ in ``data`` alone meet and spend the transfer of the gradients.
   Sharded parameters make them meet in each micro-batch as well.
5. The norm of all gradients is a meeting of everybody: what is still waited there counts for ``tensor`` first, then for
   ``pipeline``. So a step takes as long for all ranks: own work and waiting together.

A transfer takes as long as the slowest link of its group needs. Transfers aren't hidden behind computing. The
optimizer's part is in the own work before the last meeting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stragglers.scenarios.layout import Layout

Floats: TypeAlias = NDArray[np.float64]
FORWARD = 1 / 3  # of the own work: the backward computes two products for each one of the forward


@dataclass(frozen=True, slots=True)
class Transfers:
    """Seconds per step, healthy links."""

    data: float
    pipeline: float
    """All of a step's micro-batches over one edge, one way."""
    tensor: float


@dataclass(frozen=True, slots=True)
class Waits:
    """What comes out of it: ``waited`` by dimension, (steps, data, pipeline, tensor); ``seconds``, (steps,)."""

    waited: dict[str, Floats]
    seconds: Floats


def waits(layout: Layout, own: Floats, batch: Floats, link: Floats, *, transfers: Transfers, spread: Floats) -> Waits:
    """Waiting and step times; all arrays but ``spread`` are (steps, data, pipeline, tensor).

    ``own`` and ``batch`` are seconds of work and of waiting for the batch; ``link`` is how many times as long as a
    healthy one a rank's link takes; ``spread``, (micro-batches, steps, data, pipeline, tensor), is each micro-batch's
    share of the own work.
    """
    waited = {"tensor": np.zeros_like(own), "pipeline": np.zeros_like(own), "data": np.zeros_like(own)}
    meeting = _Meeting(layout, link, transfers, waited)
    done = _staged(layout, own, batch, spread, meeting) if layout.pipeline > 1 else _plain(own, batch, spread, meeting)
    done = meeting.data(done, 1.0)
    for axis, name in ((3, "tensor"), (2, "pipeline")):
        last = done.max(axis=axis, keepdims=True)
        waited[name] += last - done
        done = np.broadcast_to(last, done.shape)
    sizes = {"data": layout.data, "pipeline": layout.pipeline, "tensor": layout.tensor}
    return Waits({name: each for name, each in waited.items() if sizes[name] > 1}, done[:, 0, 0, 0].copy())


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Collectives: who is early waits, then all spend the transfer."""

    layout: Layout
    link: Floats
    transfers: Transfers
    waited: dict[str, Floats]

    def data(self, done: Floats, share: float) -> Floats:
        """All ranks of a data group, for ``share`` of the step's transfer."""
        if self.layout.data == 1:
            return done
        left = done.max(axis=1, keepdims=True) + share * self.transfers.data * self.link.max(axis=1, keepdims=True)
        self.waited["data"] += left - done
        return np.broadcast_to(left, done.shape)

    def tensor(self, done: Floats, stage: int | None, share: float) -> Floats:
        """All ranks of a tensor group, of one stage, (steps, data, tensor), or of all."""
        if self.layout.tensor == 1:
            return done
        at: tuple[slice | int, ...] = (slice(None),) if stage is None else (slice(None), slice(None), stage)
        left = done.max(axis=-1, keepdims=True) + share * self.transfers.tensor * self.link[at].max(-1, keepdims=True)
        self.waited["tensor"][at] += left - done
        return np.broadcast_to(left, done.shape)


def _plain(own: Floats, batch: Floats, spread: Floats, meeting: _Meeting) -> Floats:
    """When each rank has done its last backward, without stages."""
    done = batch
    count = len(spread)
    for part in spread:
        done = meeting.tensor(done + own * part, None, 1 / count)
        if meeting.layout.sharded:
            done = meeting.data(done, 2 / count)  # parameters are gathered twice: forward and backward
    return done


def _staged(layout: Layout, own: Floats, batch: Floats, spread: Floats, meeting: _Meeting) -> Floats:
    """The same with pipeline stages."""
    count, last = layout.micro_batches, layout.pipeline - 1
    done = [batch[:, :, stage] for stage in range(layout.pipeline)]  # of each stage: (steps, data, tensor)
    sent: dict[tuple[int, bool, int], Floats] = {}  # (stage, forward, micro-batch): when its result was ready
    hop = meeting.transfers.pipeline / count
    for stage, forward, number in order(layout.pipeline, count):
        source = stage - 1 if forward else stage + 1
        if 0 <= source <= last:
            slower = np.maximum(meeting.link[:, :, stage], meeting.link[:, :, source])
            begin = np.maximum(done[stage], sent[source, forward, number] + hop * slower)
            meeting.waited["pipeline"][:, :, stage] += begin - done[stage]
            done[stage] = begin
        share = FORWARD if forward else 1 - FORWARD
        worked = done[stage] + share * own[:, :, stage] * spread[number][:, :, stage]
        done[stage] = sent[stage, forward, number] = meeting.tensor(worked, stage, share / count)
    return np.stack(done, axis=2)


@cache
def order(stages: int, micro_batches: int) -> tuple[tuple[int, bool, int], ...]:
    """(stage, forward, micro-batch) of all work in one step, nothing before what it needs."""
    left = [list(_one_forward_one_backward(stage, stages, micro_batches)) for stage in range(stages)]
    found: list[tuple[int, bool, int]] = []
    ready: set[tuple[int, bool, int]] = set()
    while any(left):
        for stage, works in enumerate(left):
            while works:
                forward, number = works[0]
                source = stage - 1 if forward else stage + 1
                if 0 <= source < stages and (source, forward, number) not in ready:
                    break
                works.pop(0)
                ready.add((stage, forward, number))
                found.append((stage, forward, number))
    return tuple(found)


def _one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[tuple[bool, int]]:
    ahead = min(micro_batches, stages - 1 - stage)
    yield from ((True, number) for number in range(ahead))
    for number in range(ahead, micro_batches):
        yield True, number
        yield False, number - ahead
    yield from ((False, number) for number in range(micro_batches - ahead, micro_batches))
