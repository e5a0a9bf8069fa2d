"""How the model is spread over the GPUs: everything is applied here, in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder, Part, whole
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.parallel.compiling import compile_blocks
from lockstep_trainer.parallel.context import apply_context
from lockstep_trainer.parallel.expert import apply_experts
from lockstep_trainer.parallel.layout import SPLIT_BACKWARD, Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.recompute import Recompute, recompute_blocks
from lockstep_trainer.parallel.sharded import local_shard, mixed_precision, own_shard, shard_part
from lockstep_trainer.parallel.tensor import apply_tensor
from lockstep_trainer.precision import convert_to_float8


def build_parts(
    config: DecoderConfig,
    layout: Layout,
    meshes: Meshes,
    *,
    device: torch.device,
    precision: str = "fp32",
    recompute: Recompute = "none",
    compile_backend: str | None = None,
    stages: Sequence[Part] | None = None,
) -> list[Decoder]:
    """This rank's parts of the model, one for each of its ``stages`` (None: the whole model), with memory for the
    shards of their parameters but no values yet; buffers have their first ones.

    Parameters are float32 whatever the ``precision``. ``compile_backend`` None does not compile.
    """
    parts = []
    for stage in stages if stages is not None else [whole(config)]:
        with torch.device("meta"):
            part = Decoder(config, stage)
        if precision == "float8":
            convert_to_float8(part)
        apply_tensor(part, layout, meshes)
        if config.experts:
            apply_experts(part, layout, meshes)
        if layout.context > 1:
            apply_context(part, layout, meshes)
        recompute_blocks(part, recompute)
        if compile_backend is not None:
            compile_blocks(part, compile_backend, split_backward=layout.schedule in SPLIT_BACKWARD)
        shard_part(part, layout, meshes, mixed_precision(precision))
        part.to_empty(device=device)
        reset_buffers(part)  # here, not with fresh weights: a checkpoint holds only some of them
        parts.append(part)
    return parts


@torch.no_grad()
def initialize(parts: Sequence[Decoder], seed: int) -> None:
    """Give the parameters their fresh values: the same at every layout, since each rank draws the whole tensor and
    keeps its part; one tensor is whole at a time."""
    for part in parts:
        for name, parameter in part.named_parameters():
            value = initial_weight(name, parameter.shape, part.config, seed, parameter.device)
            local_shard(parameter).copy_(own_shard(value, parameter))


def reset_buffers(part: nn.Module) -> None:
    """Give buffers their first values: memory came to them without any.

    A module that registers buffers has a method ``reset_buffers()``; TypeError where one has not.
    """
    for name, module in part.named_modules():
        if next(module.buffers(recurse=False), None) is not None:
            reset = getattr(module, "reset_buffers", None)
            if reset is None:
                raise TypeError(f"{name} ({type(module).__name__}) has buffers and no method reset_buffers()")
            reset()
