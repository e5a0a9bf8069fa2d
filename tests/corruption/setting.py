"""Tiny models on several ranks, as tests and the benchmark of ring replay train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from forked import meet, rendezvous_store, start_all, wait_all
from lockstep_trainer.batch import Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.parallel.pipeline import parts_of
from lockstep_trainer.parallel.recompute import Recompute
from lockstep_trainer.parallel.sharded import sum_gradients
from lockstep_trainer.parallel.stages import modelled_costs

CPU = torch.device("cpu")
DENSE = DecoderConfig(dim=24, layers=4, heads=4, kv_heads=2, ffn_dim=36, vocab_size=132, norm_eps=1e-5)
MIXTURE = replace(DENSE, experts=4, expert_dim=12, dense_layers=1, balance_rate=0.05)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and how."""

    layout: Layout
    config: DecoderConfig = DENSE
    precision: str = "fp32"
    recompute: Recompute = "none"
    compiler: str | None = None
    micro_batches: int = 2
    own: bool = False
    """A model of the user's own, with dropout and a buffer that counts."""
    samples: int = 24
    """Of a step, on all ranks together."""
    length: int = 16
    """Tokens of a sample."""

    @property
    def tokens(self) -> int:
        """Of a step: what its sums are divided by."""
        return self.samples * self.length


class WithDropout(nn.Module):
    """What a user may bring."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(132, 16)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2)) for _ in range(2)])
        self.head = nn.Linear(16, 132)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to logits (B, T, 132)."""
        assert isinstance(self.seen, Tensor)
        self.seen += tokens.numel()
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        y: Tensor = self.head(x)
        return y


def build(setting: Setting) -> Engine:
    """The setting's engine on this rank; all ranks call it at the same time. The same parameters each time."""
    layout = setting.layout
    meshes = Meshes.build(layout, CPU)
    size = setting.samples // layout.data_width // setting.micro_batches
    loss = Loss(1e-2, meshes.tensor.get_group())
    if setting.own:
        torch.manual_seed(0)
        model = WithDropout()
        for layer in model.layers:
            fully_shard(layer, mesh=meshes.fsdp)
        fully_shard(model, mesh=meshes.fsdp, reshard_after_forward=False)
        sum_gradients(model)
        torch.manual_seed(meshes.rank)
        return Engine([model], layout, meshes, loss, micro_batch_size=size, device=CPU)
    parts = build_parts(
        setting.config,
        layout,
        meshes,
        device=CPU,
        precision=setting.precision,
        recompute=setting.recompute,
        compile_backend=setting.compiler,
        stages=parts_of(layout, meshes.at.pipeline, modelled_costs(setting.config, setting.length)),
    )
    initialize(parts, 1)
    dtype = torch.float32 if setting.precision == "fp32" else torch.bfloat16
    return Engine(parts, layout, meshes, loss, micro_batch_size=size, device=CPU, dtype=dtype)


def batch_of(step: int, setting: Setting, rank: int) -> Batch:
    """The rank's samples of a step."""
    generator = torch.Generator().manual_seed(step)
    vocabulary = setting.config.vocab_size
    tokens = torch.randint(0, vocabulary, (setting.samples, setting.length + 1), generator=generator)
    size = setting.samples // setting.layout.data_width
    own = tokens[size * setting.layout.data_rank(rank) :][:size]
    return Batch(own[:, :-1].contiguous(), own[:, 1:].contiguous())


def on_ranks(folder: Path, number: int, body: Callable[[int], None]) -> None:
    """Run ``body`` on so many ranks; what they print is in the failure."""

    def rank_main(rank: int, port: int) -> None:
        meet(rank, number, port, timeout=600)
        body(rank)

    with rendezvous_store() as port:
        codes = wait_all(start_all([partial(rank_main, rank, port) for rank in range(number)], logs=[folder] * number))
    said = (folder / "output.log").read_text()
    assert codes == [0] * number, f"{codes}\n{said[:5000]}\n…\n{said[-2000:]}"  # others end since the first did
