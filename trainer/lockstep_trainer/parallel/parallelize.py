"""How the model is spread over the GPUs: the only module that knows model and parallelism at once.

Sharded data parallelism with ``fully_shard``: each block is gathered when it runs and given back afterwards; what is
outside the blocks (embedding, last norm, head) belongs to the root. With ``replicate`` > 1 the shards are spread over
a part of the GPUs only, and the parts hold copies (hybrid sharding): parameters travel within a part, gradients also
between them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.init import initial_weight

REPLICATE, SHARD = "replicate", "shard"


def make_mesh(device: torch.device, world_size: int, replicate: int) -> DeviceMesh:
    """The ranks as one axis (shard), or as two (replicate, shard)."""
    if replicate == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device.type, (replicate, world_size // replicate), mesh_dim_names=(REPLICATE, SHARD))


def build_model(config: DecoderConfig, mesh: DeviceMesh, device: torch.device, precision: str) -> Decoder:
    """The model, sharded over ``mesh``, with memory for its shards but no values yet.

    Parameters are float32; with ``precision`` bf16, forward and backward run in bfloat16 and gradients are summed in
    float32.
    """
    with torch.device("meta"):
        model = Decoder(config)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if precision == "fp32":
        policy = MixedPrecisionPolicy()
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    return model


def initialize(model: Decoder, seed: int) -> None:
    """Give the parameters their fresh values: the same at every layout, since each rank draws the whole tensor and
    keeps its part."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = initial_weight(name, parameter.shape, model.config, seed, parameter.device)
            if isinstance(parameter, DTensor):
                local = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(local.to_local())
            else:
                parameter.copy_(full)


def accumulate(model: nn.Module, last: bool) -> None:
    """Reduce gradients over the ranks only behind the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
