"""The sampler's part of a manifest, for tests of what only carries it."""

from __future__ import annotations

from lockstep_trainer.checkpoint.manifest import BatchState, SamplerState, SourceState


def sampler_state(steps: int) -> SamplerState:
    """One source of 100 samples, eight per step."""
    return SamplerState(
        seed=0,
        steps=steps,
        drawn=8 * steps,
        sources=(SourceState(name="data", samples=100, data="0" * 64),),
        batches=(BatchState(step=1, first=0, samples=8),),
        data="0" * 64,
    )
