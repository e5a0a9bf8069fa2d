"""Pairs of ranks send each other the same few megabytes again and again: what their links are measured by.

All ranks do it behind the same steps, at the same time, each with one other. Who with whom follows from the number of
the step, so that nobody has to ask and no rank waits for one that does not come. There are three pairings by turns, as
many as the search for slow ranks compares (``stragglers.pairs``): with each further partner NCCL would open further
connections, which keep their memory. What a pair is measured by is the path that training takes: gloo's, or NCCL's
within and between nodes.

Before the measured turns a pair exchanges a few bytes, so that neither waits in them for the other. It needs 17 MB of a
GPU's memory, 2 MB on a CPU.
"""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch
import torch.distributed as dist

from lockstep_trainer.stragglers.pairs import matching
from lockstep_trainer.stragglers.settings import LINK_ROUNDS

EVERY = 4
"""Steps between turns. The search looks at all links at its 5th step and, where some are slow, at its 22nd
(``stragglers.settings.LINK_LOOKS``): by then three turns must have been told."""
LEAST = 3
"""Ranks of a job from which a slow link can be told to be a rank's."""
_TURNS = 3
"""Measurements whose median counts."""
_TAG = 0x10C5
"""Of gloo's messages, so that they are taken for no others; NCCL has none."""


@cache
def partners(ranks: int, turn: int) -> dict[int, int]:
    """Rank → its partner in a turn, one of ``LINK_ROUNDS`` by turns. A rank may have none."""
    pairs = matching(range(ranks), turn % LINK_ROUNDS)
    return {one: other for pair in pairs for one, other in (pair, pair[::-1])}


class PairMeter:
    """Of one rank."""

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        """Of rank ``rank`` of the world's ``ranks``; all of them make one."""
        self._rank, self._ranks, self._device = rank, ranks, device
        elements = 2**22 if device.type == "cuda" else 2**19
        self._sent = torch.zeros(elements, dtype=torch.bfloat16, device=device)
        self._received = torch.empty_like(self._sent)
        self._pending: tuple[int, list[tuple[torch.cuda.Event, torch.cuda.Event]]] | None = None
        self._told: tuple[int, float] | None = None

    def due(self, step: int) -> bool:
        """Whether pairs exchange data behind this step."""
        return step % EVERY == 0

    def measure(self, step: int) -> None:
        """Behind a step, on all ranks. A GPU does it behind what it has to do; nothing waits for it. Raises what a
        collective raises where the partner goes away."""
        partner = partners(self._ranks, step // EVERY).get(self._rank)
        if partner is None:
            return
        self._exchange(partner, 1)
        if self._device.type == "cuda":
            self._pending = (partner, [self._events(partner) for _ in range(_TURNS)])
        else:
            self._told = (partner, statistics.median(self._timed(partner) for _ in range(_TURNS)))

    def take(self) -> tuple[int, float] | None:
        """Partner and seconds, once for each turn; None where there was none, or it is not done."""
        if self._pending and self._pending[1][-1][1].query():  # type: ignore[no-untyped-call]
            partner, pairs = self._pending
            seconds = statistics.median(begun.elapsed_time(ended) / 1000 for begun, ended in pairs)
            self._pending, self._told = None, (partner, seconds)
        told, self._told = self._told, None
        return told

    def _exchange(self, partner: int, elements: int) -> None:
        operations = [
            dist.P2POp(operation, tensor[:elements], partner, tag=_TAG)
            for operation, tensor in ((dist.isend, self._sent), (dist.irecv, self._received))
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    def _timed(self, partner: int) -> float:
        begun = time.perf_counter()
        self._exchange(partner, len(self._sent))
        return time.perf_counter() - begun

    def _events(self, partner: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        self._exchange(partner, len(self._sent))
        ended.record()
        return begun, ended
