"""A world of one rank with NCCL, or of many of which only this one exists."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist


def alone(device: torch.device) -> None:
    """This process is a world by itself, as the trainer joins one."""
    torch.cuda.set_device(device)
    file = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{file}", rank=0, world_size=1, device_id=device)


def first_of(ranks: int, device: torch.device) -> None:
    """Rank 0 of ``ranks`` of which no other exists: collectives return at once with whatever is in memory, so that the
    code, its kernels and its memory can be tried, and no number means anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.cuda.set_device(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
