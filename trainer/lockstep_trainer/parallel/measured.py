"""What layers, embedding and head cost on the device at hand, for a pipeline that is split by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder, Part
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.recompute import Recompute, recompute_blocks
from lockstep_trainer.parallel.stages import Costs

WARM_UP, REPEATS = 2, 5


def measured_costs(
    config: DecoderConfig,
    layout: Layout,
    *,
    device: torch.device,
    precision: str,
    recompute: Recompute,
    micro_batch_size: int,
    sequence_length: int,
    before: Sequence[float] | None = None,
) -> Costs:
    """Seconds of forward and backward of each piece for one micro-batch, the median of a few runs.

    ``before``: what rank 0 knows of an earlier measurement (``Costs.numbers``), which counts then: another split would
    make the snapshots in memory unusable.

    Rank 0 measures one layer of each kind, embedding and head, and all ranks get its figures, since they must agree on
    the split; all call it. It runs the share of each matrix that a tensor rank has, without collectives, which are as
    many for each layer. Context parallelism divides all of it alike, so the whole sequence is run.
    """
    costs = torch.zeros(2 + config.layers, dtype=torch.float64, device=device)
    if dist.get_rank() == 0 and before is not None and len(before) == len(costs):
        costs += torch.tensor(before, dtype=torch.float64, device=device)
    elif dist.get_rank() == 0:
        kinds = sorted({config.has_experts(layer) for layer in range(config.layers)})
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            embedding, head, *by_kind = _measure(
                _slice(config, layout),
                [next(layer for layer in range(config.layers) if config.has_experts(layer) == kind) for kind in kinds],
                device=device,
                dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
                recompute=recompute,
                shape=(micro_batch_size, sequence_length),
            )
        layers = [by_kind[kinds.index(config.has_experts(layer))] for layer in range(config.layers)]
        costs += torch.tensor([embedding, *layers, head], dtype=torch.float64, device=device)
    dist.broadcast(costs, src=0)
    first, *middle, last = costs.tolist()
    return Costs(first, tuple(middle), last)


def _slice(config: DecoderConfig, layout: Layout) -> DecoderConfig:
    """The share of a rank: 1 / tensor of a dense layer. The experts of a rank have as much work whether they are cut or
    spread, so they are as wide as tensor parallelism would leave them and as many as expert parallelism does."""
    tensor = layout.tensor
    return replace(
        config,
        heads=config.heads // tensor,
        kv_heads=config.kv_heads // tensor,
        head_size=config.head_dim,
        ffn_dim=config.ffn_dim // tensor,
        vocab_size=config.vocab_size // tensor,
        tie_embeddings=False,
        experts=max(config.experts_per_token, config.experts // layout.expert) if config.experts else 0,
        expert_dim=max(1, (config.expert_dim or config.ffn_dim) // tensor) if config.experts else 0,
        shared_expert_dim=config.shared_expert_dim // tensor,
    )


def _measure(
    config: DecoderConfig,
    layers: list[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    recompute: Recompute,
    shape: tuple[int, int],
) -> list[float]:
    """Seconds of embedding, head and each of the ``layers``."""
    tokens = torch.randint(config.vocab_size, shape, device=device)
    hidden = torch.randn(*shape, config.dim, dtype=dtype, device=device, requires_grad=True)
    loss = Loss()

    def timed(part: Part, x: Tensor, backward: Callable[[Tensor], None]) -> float:
        with torch.device(device):
            model = Decoder(config, part).to(dtype)
        recompute_blocks(model, recompute)
        return _seconds(lambda: backward(model(x)), model, device)

    def by_ones(y: Tensor) -> None:
        torch.autograd.backward(y, torch.ones_like(y))

    return [
        timed(Part((), first=True, last=False), tokens, by_ones),
        timed(
            Part((), first=False, last=True), hidden, lambda logits: torch.autograd.backward(loss(logits, tokens)[0])
        ),
        *(timed(Part((layer,), first=False, last=False), hidden, by_ones) for layer in layers),
    ]


def _seconds(run: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    times = []
    for _ in range(WARM_UP + REPEATS):
        model.zero_grad(set_to_none=True)
        _synchronize(device)
        begun = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM_UP:])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
