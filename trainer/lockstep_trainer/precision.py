"""Matrix products in float8: whether they can be, and which layers take part. The rest of the precision is FSDP's
business (``parallel.sharded.mixed_precision``)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from lockstep_trainer.errors import UserError

_FIELD = "trainer.recipe.precision"
FLOAT8_MULTIPLE = 16
"""Sides of a matrix that cuBLAS multiplies in float8 are multiples of this."""


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError where ``device`` has no float8, or torchao is missing, and the job asks for it."""
    if precision != "float8":
        return
    if device.type != "cuda":
        raise UserError(f"{_FIELD}: float8 needs a GPU, and this worker runs on {device.type}; choose bf16 or fp32")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"{_FIELD}: {torch.cuda.get_device_name(device)} has no float8 (it came with Ada and Hopper); choose bf16"
        )
    _torchao()


def convert_to_float8(part: nn.Module) -> int:
    """Let the linear layers within the blocks of ``part`` multiply in float8; returns how many do.

    Called on the meta device, before tensor parallelism is applied and FSDP. Each tensor is scaled by its largest
    element, found at use (torchao's default recipe, tensorwise). Left as they are: embedding and head, whose precision
    decides over the loss (Micikevicius et al.: FP8 Formats for Deep Learning, 2022, leaves them as well), the router,
    and layers with a side that is no multiple of 16. Experts are no linear layers and stay in bfloat16. Raises
    UserError without torchao.
    """
    float8 = _torchao()
    convert = float8.convert_to_float8_training
    count = 0

    def wanted(module: nn.Module, name: str) -> bool:
        nonlocal count
        found = takes_float8(module, name)
        count += found
        return found

    convert(part, module_filter_fn=wanted)
    return count


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether the layer ``name`` of a part is converted."""
    return (
        isinstance(module, nn.Linear)
        and name.startswith("blocks.")
        and not name.endswith("router")
        and module.in_features % FLOAT8_MULTIPLE == 0
        and module.out_features % FLOAT8_MULTIPLE == 0
    )


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise UserError(
            f"{_FIELD}: float8 needs torchao, which can't be imported ({error}); install torchao in the image, or "
            "choose bf16"
        ) from None
