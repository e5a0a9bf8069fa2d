"""Rank 0 of layouts of eight GPUs, of which the others do not exist: that the code runs on a GPU, compiled, and that
it takes the memory that the formula says. Collectives do nothing here, so no number of it means anything; expert and
pipeline parallelism are left out, where what is received decides what is done next."""

from __future__ import annotations

import gc
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu.ranks import first_of
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.memory import Work, memory_by_pipeline_rank
from lockstep_trainer.optim.build import build_optimizer, start_fresh
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.runtime import set_allocator

GPU = torch.device("cuda", 0)
DENSE = DecoderConfig(dim=2048, layers=8, heads=16, kv_heads=8, ffn_dim=5632, vocab_size=32768)
MIXTURE = DecoderConfig(
    dim=1024, layers=6, heads=16, kv_heads=8, ffn_dim=1408, vocab_size=32768, experts=16, experts_per_token=2
)
CASES: dict[str, tuple[DecoderConfig, Layout, Any]] = {
    "one GPU": (DENSE, Layout(), "none"),
    "shard 8": (DENSE, Layout(shard=8), "none"),
    "shard 8, selective": (DENSE, Layout(shard=8), "selective"),
    "shard 8, full": (DENSE, Layout(shard=8), "full"),
    "replicate 2 × shard 4": (DENSE, Layout(replicate=2, shard=4), "none"),
    "shard 2 × tensor 4": (DENSE, Layout(shard=2, tensor=4), "none"),
    "shard 2 × context 4": (DENSE, Layout(shard=2, context=4), "none"),
    "shard 2 × context 4, ulysses": (DENSE, Layout(shard=2, context=4, context_method="ulysses"), "none"),
    "mixture, one GPU": (MIXTURE, Layout(), "none"),
    "mixture, shard 8": (MIXTURE, Layout(shard=8), "none"),
}
LENGTH, SAMPLES = 4096, 2


def run(folder: Path) -> dict[str, Any]:
    """Peak of memory beside the formula's, by layout."""
    set_allocator(GPU)
    found: dict[str, Any] = {}
    wrong = []
    for name, (config, layout, recompute) in CASES.items():
        try:
            found[name] = _case(config, layout, recompute)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
            wrong.append(name)
        print(name, found[name], flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        torch.cuda.empty_cache()
    assert not wrong, {name: found[name] for name in wrong}
    return found


def _case(config: DecoderConfig, layout: Layout, recompute: Any) -> dict[str, Any]:
    first_of(layout.world_size, GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    meshes = Meshes.build(layout, GPU, timeout=timedelta(seconds=60))
    parts = build_parts(
        config, layout, meshes, device=GPU, precision="bf16", recompute=recompute, compile_backend="inductor"
    )
    initialize(parts, seed=0)
    group = meshes.tensor.get_group() if layout.tensor > 1 else None
    engine = Engine(parts, layout, meshes, Loss(0.0, group), micro_batch_size=SAMPLES, device=GPU)
    named = list(engine.named_parameters())
    optimizer = build_optimizer(named, OptimizerSpec(lr=1e-4))
    start_fresh(optimizer)
    tokens = torch.randint(0, config.vocab_size, (SAMPLES, LENGTH + 1), device=GPU)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        engine.forward_backward(batch, SAMPLES * LENGTH)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() - before
    (expected,) = memory_by_pipeline_rank(
        config, layout, Work(sequence_length=LENGTH, micro_batch=SAMPLES, recompute=recompute)
    )
    return {
        "peak_gib": round(peak / 2**30, 3),
        "formula_gib": round(expected.total / 2**30, 3),
        "first_step_s": round(seconds[0], 1),
        "step_ms": round(1e3 * seconds[-1], 1),
    }
