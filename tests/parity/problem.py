"""What is trained: weights, batches and recipe, the same for the reference and for every rank."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.model.config import DecoderConfig
from parity.cases import LENGTH, SAMPLES

Z_WEIGHT = 1e-2
LARGEST_NORM = 0.5  # below the norms that occur, so that clipping does something
SPEC = OptimizerSpec(lr=3e-3, weight_decay=0.1, eps=1e-6)


def weight(name: str, shape: torch.Size) -> Tensor:
    """A parameter's first value: larger than fresh weights, so that every part of the model matters to the loss."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    is_gain = len(shape) < 2 and not name.endswith("bias")
    return (0.2 * noise + is_gain).to(torch.get_default_dtype())


def global_batch(step: int, config: DecoderConfig, *, documents: bool) -> Batch:
    """A step's batch. Samples have unequal numbers of targets, the first has none."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, config.vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    share = torch.rand(SAMPLES, 1, generator=generator, dtype=torch.float64)
    share[0] = 0
    targets[torch.rand(SAMPLES, LENGTH, generator=generator, dtype=torch.float64) >= share] = IGNORE
    if not documents:
        return Batch(inputs, targets)
    # A document ends behind a fifth of the tokens: some are one token long, some span half a sample.
    begins = torch.rand(SAMPLES, LENGTH, generator=generator, dtype=torch.float64) < 0.2
    begins[:, 0] = True
    number = begins.cumsum(1) - 1
    at = torch.arange(LENGTH).expand(SAMPLES, LENGTH)
    start = torch.where(begins, at, 0).cummax(1).values
    return Batch(inputs, targets, at - start, number)
