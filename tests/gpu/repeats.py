"""Whether a step gives the same bits twice on a GPU: what replay for silent corruption stands on, and what it costs
to have it where the default kernels do not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from gpu.notes import keep
from gpu.ranks import alone
from lockstep_trainer.batch import Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.runtime import make_deterministic, refusing

GPU = torch.device("cuda", 0)
SIZES = {"dim": 1024, "layers": 4, "heads": 16, "kv_heads": 4, "ffn_dim": 2816, "vocab_size": 32768}
TIMES = 4


def run(folder: Path) -> dict[str, Any]:
    """For each model: how many of the gradients differ between repetitions, and milliseconds of a step."""
    alone(GPU)
    found: dict[str, Any] = {}
    for deterministic in (False, True):
        if deterministic:
            make_deterministic()
        for name, extra in {"dense": {}, "mixture": {"experts": 8, "ffn_dim": 1024}}.items():
            key = f"{name}, {'deterministic' if deterministic else 'default'} algorithms"
            found[key] = _case(DecoderConfig(**{**SIZES, **extra}), deterministic)
            print(key, found[key], flush=True)
            keep(folder, "repeats", found)
            if deterministic:
                assert found[key]["differ"] == 0, f"{key}: {found[key]}"
    return found


def _case(config: DecoderConfig, deterministic: bool) -> dict[str, Any]:
    layout = Layout()
    meshes = Meshes.build(layout, GPU)
    parts = build_parts(config, layout, meshes, device=GPU, precision="bf16", compile_backend=None)
    initialize(parts, seed=0)
    engine = Engine(parts, layout, meshes, Loss(), micro_batch_size=2, device=GPU)
    tokens = torch.randint(0, config.vocab_size, (4, 2049), generator=torch.Generator().manual_seed(0)).to(GPU)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    first: dict[str, torch.Tensor] = {}
    differ: set[str] = set()
    seconds = []
    for number in range(TIMES + 1):
        for _, parameter in engine.named_parameters():
            parameter.grad = None
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with refusing(deterministic):
            engine.forward_backward(batch, batch.tokens)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        for name, parameter in engine.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if number == 0:
                first[name] = local.clone()
            elif not torch.equal(first[name], local):
                differ.add(name)
    return {"tensors": len(first), "differ": len(differ), "which": sorted(differ)[:6],
            "milliseconds": round(1e3 * min(seconds[1:]), 2)}  # fmt: skip
