"""The training state as torch's distributed checkpoint sees it, and how it is saved and loaded.

Names are torch's canonical ones (``model.<parameter>``, ``optimizer.state.<parameter>.exp_avg``), so that other tools
and other layouts find what they look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from lockstep_trainer.checkpoint.dcp import ObjectStoreWriter
from lockstep_trainer.checkpoint.load import load
from lockstep_trainer.checkpoint.manifest import FileEntry, Manifest
from lockstep_trainer.errors import Corrupt, PeerLost, StoreError, TrainerError
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


def save_state(
    state: dict[str, Any],
    store: ObjectStore,
    folder: str,
    *,
    extra: Mapping[str, bytes],
    group: dist.ProcessGroup | None,
) -> tuple[FileEntry, ...]:
    """Write the step folder; all ranks of ``group`` call it. Rank 0 gets the list of files, the others an empty one.

    Raises StoreError on all ranks where the store failed one of them.
    """
    writer = ObjectStoreWriter(store, folder, extra)
    try:
        dcp.save(state, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _cause(error) from error
    return writer.files


def load_state(
    state: dict[str, Any], store: ObjectStore, folder: str, manifest: Manifest, *, group: dist.ProcessGroup | None
) -> None:
    """Read the step folder into ``state`` in place; all ranks of ``group`` call it, at any layout.

    Raises Corrupt on all ranks where one of them met a wrong byte, StoreError where the store failed one of them, and
    UserError where ``state`` is not what was saved; ``state`` is then worthless. Memory: see ``load``.
    """
    load(state, store, folder, manifest, group=group)


def _cause(error: CheckpointException) -> BaseException:
    """The error behind torch's collection of errors by rank: the one that decides what all ranks do next."""
    causes = [failure[0] for _, failure in sorted(error.failures.items())]
    for kind in (Corrupt, StoreError, TrainerError):
        lasting = [cause for cause in causes if isinstance(cause, kind)]
        # One rank that can't be helped outweighs those that could try again.
        lasting.sort(key=lambda cause: isinstance(cause, StoreError) and cause.temporary)
        if lasting:
            return lasting[0]
    return causes[0] if causes else PeerLost(f"a checkpoint failed: {error}")
