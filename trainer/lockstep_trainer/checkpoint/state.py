"""The training state as torch's distributed checkpoint sees it, and how it is loaded.

Names are torch's canonical ones (``model.<parameter>``, ``optimizer.state.<parameter>.exp_avg``), so that other tools
and other layouts find what they look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep_trainer.checkpoint.load import load
from lockstep_trainer.checkpoint.manifest import Manifest
from lockstep_trainer.storage import ObjectStore


def training_state(
    model: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, nn.Parameter]] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Everything that a step changes, as nested dicts of tensors; DTensors where it is sharded.

    ``model`` has parameters and persistent buffers by name, ``parameters`` those that the optimizer steps. Each rank
    gives what it has; what several ranks have under one name is written once.
    """
    state: dict[str, Any] = {"model": dict(model)}
    if optimizer is not None:
        state["optimizer"] = {"state": {name: optimizer.state[value] for name, value in parameters}}
    return state


def load_state(
    state: dict[str, Any], store: ObjectStore, folder: str, manifest: Manifest, *, group: dist.ProcessGroup | None
) -> None:
    """Read the step folder into ``state`` in place; all ranks of ``group`` call it, at any layout.

    Raises Corrupt on all ranks where one of them met a wrong byte, StoreError where the store failed one of them, and
    UserError where ``state`` is not what was saved; ``state`` is then worthless. Memory: see ``load``.
    """
    load(state, store, folder, manifest, group=group)
