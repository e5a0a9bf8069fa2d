"""All kinds of scenarios."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stragglers.scenarios import from_traces, healthy, restarts, slow_rank, workload
from stragglers.scenarios.drafts import Draft, Unsuited
from stragglers.scenarios.scenario import Scenario

TRIES = 200
KINDS: Mapping[str, Callable[[Draft], Scenario]] = {
    "clock": slow_rank.clock,
    "compute": slow_rank.compute,
    "memory": slow_rank.memory,
    "host": slow_rank.host,
    "link": slow_rank.link,
    "gentle": slow_rank.gentle,
    "ramp": slow_rank.ramp,
    "comes-and-goes": slow_rank.comes_and_goes,
    "recovers": slow_rank.recovers,
    "noisy": slow_rank.noisy,
    "among-lengths": slow_rank.among_lengths,
    "with-evaluations": slow_rank.with_evaluations,
    "beside-imbalance": slow_rank.beside_imbalance,
    "two": slow_rank.two,
    "node": slow_rank.node,
    "some-clocks": slow_rank.some_clocks,
    "data-rank": workload.data_rank,
    "data-store": workload.data_store,
    "pauses": workload.pauses,
    "lengths": workload.lengths,
    "heavy-head": workload.heavy_head,
    "one-more-layer": workload.one_more_layer,
    "restart-same": restarts.same,
    "restart-moved": restarts.moved,
    "restart-swapped": restarts.swapped,
    "restart-fewer": restarts.fewer,
    "recorded-slow": from_traces.slow,
    "healthy-long": healthy.long,
    "healthy-large": healthy.large,
    "healthy-noisy": healthy.noisy,
    "healthy-drift": healthy.drift,
    "healthy-varying": healthy.varying,
    "healthy-evaluations": healthy.evaluations,
    "healthy-restart": restarts.clean,
    "healthy-recorded": from_traces.clean,
    "burst": healthy.burst,
    "below": healthy.below,
    "slight-stage": workload.slight_stage,
    "slight-lengths": workload.slight_lengths,
    "hiccup": workload.hiccup,
    "rare-pauses": workload.rare_pauses,
    "near": healthy.near,
}


def scenario(kind: str, seed: int) -> Scenario:
    """The scenario of that kind and seed: always the same."""
    for attempt in range(TRIES):
        try:
            return KINDS[kind](Draft(kind, seed, attempt))
        except Unsuited:
            continue
    raise RuntimeError(f"{kind}-{seed}: none of {TRIES} drawn jobs can have it")
