"""Steps without a fault, all of them replayed: whatever is found in them is false."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from corruption.setting import DENSE, MIXTURE, Setting, batch_of, build
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.expert import update_balance
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.parallelize import initialize
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling

_TINY = replace(DENSE, dim=16, layers=1, ffn_dim=24)
LAYOUTS: Mapping[str, Setting] = {
    "dp4": Setting(Layout(shard=4), _TINY, micro_batches=1, samples=4, length=8),
    "hsdp2x2-bf16": Setting(
        Layout(replicate=2, shard=2), _TINY, precision="bf16", micro_batches=1, samples=4, length=8
    ),
    "dp2-tp2": Setting(Layout(shard=2, tensor=2), _TINY, micro_batches=1, samples=4, length=8),
    "dp2-cp2": Setting(Layout(shard=2, context=2), _TINY, micro_batches=1, samples=4, length=8),
    "dp2-pp2": Setting(Layout(shard=2, pipeline=2), replace(_TINY, layers=2), micro_batches=2, samples=4, length=8),
    "dp4-ep2": Setting(
        Layout(shard=4, expert=2), replace(MIXTURE, dim=16, layers=2), micro_batches=1, samples=4, length=8
    ),
}
"""Of four ranks; all micro-batches are compared, but with a pipeline."""
PIECE = 100
"""Steps from one initialization to the next, and of one record."""


def train(setting: Setting, pieces: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One rank's part of the pieces, each with parameters and samples of its own."""
    engine = build(setting)
    heard: list[Disagreement] = []
    ring = Ring(engine, None, sampling=Sampling(3, 1.0), compiled=False, report=heard.append)
    parameters = list(engine.named_parameters())
    parts = [part for part in engine.parts if isinstance(part, Decoder)]
    for piece in pieces:
        heard.clear()
        replay = Replay(engine, ring, report=heard.append)  # parameters change between two pieces
        initialize(parts, piece + 1)
        torch.manual_seed(1000 * piece + engine.meshes.rank)
        optimizer = build_optimizer(parameters, OptimizerSpec(lr=3e-3, eps=1e-6))
        for step in range(piece * PIECE + 1, (piece + 1) * PIECE + 1):
            replay.forward_backward(step, batch_of(step, setting, engine.meshes.rank), setting.tokens)
            with replay.update(step, parameters, optimizer):
                optimizer.step()
            optimizer.zero_grad()
            update_balance(engine.parts, engine.meshes)
        yield {
            "piece": piece,
            "steps": PIECE,
            "points": len(ring._points) * setting.layout.world_size * PIECE,
            "found": [str(each.verdicts) for each in heard],
        }
