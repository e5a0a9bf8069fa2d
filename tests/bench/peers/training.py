"""The training that checkpoints are taken of: a decoder sharded over all ranks, AdamW, the same batch each time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Size:
    """Of the model and of a step."""

    dim: int
    layers: int
    vocab: int
    tokens: int  # of a rank in a step

    @property
    def config(self) -> DecoderConfig:
        """The decoder."""
        heads = max(1, self.dim // 64)
        ffn = -(-self.dim * 8 // 3 // 64) * 64
        return DecoderConfig(
            dim=self.dim, layers=self.layers, heads=heads, kv_heads=heads, ffn_dim=ffn, vocab_size=self.vocab
        )


class Training:
    """One rank's part of it."""

    def __init__(self, size: Size, rank: int, ranks: int) -> None:
        layout = Layout(shard=ranks)
        meshes = Meshes.build(layout, CPU)
        parts = build_parts(size.config, layout, meshes, device=CPU)
        initialize(parts, seed=5)
        self.engine = Engine(parts, layout, meshes, Loss(1e-4, None), micro_batch_size=1, device=CPU)
        self.parameters = list(self.engine.named_parameters())
        self.optimizer = build_optimizer(self.parameters, OptimizerSpec(lr=1e-4))
        generator = torch.Generator().manual_seed(rank)
        tokens = torch.randint(0, size.vocab, (1, size.tokens + 1), generator=generator)
        self._batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        self._tokens = size.tokens * ranks

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: nested, DTensors where it is sharded."""
        return training_state(self.engine.state(), self.parameters, self.optimizer)

    def tensors(self) -> list[Tensor]:
        """All of this rank's numbers, in one order."""
        found: list[Tensor] = []

        def add(value: Any) -> None:
            if isinstance(value, dict):
                for each in value.values():
                    add(each)
            else:
                found.append(value.to_local().detach() if isinstance(value, DTensor) else value.detach())

        add(self.state())
        return found

    def step(self, before_update: Callable[[], None], done: Callable[[], bool]) -> tuple[float, bool]:
        """One step. ``before_update`` is called where the state is about to change, ``done`` before the all-reduce that
        each step has. Returns the seconds that ``before_update`` took, and whether all ranks are done."""
        sums = self.engine.forward_backward(self._batch, self._tokens)
        totals = torch.cat([sums, torch.tensor([float(done())], dtype=sums.dtype)])
        dist.all_reduce(totals)
        begun = time.perf_counter()
        before_update()
        waited = time.perf_counter() - begun
        self.optimizer.step()
        self.optimizer.zero_grad()
        return waited, int(totals[-1]) == dist.get_world_size()
