"""Small facts that all ranks must share before they go on together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep_trainer.errors import TrainerError

T = TypeVar("T")


def by_first(call: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Rank 0's result of ``call``, on all ranks of ``group``; where it raises a TrainerError there, all raise it.

    Only rank 0 calls. The result is pickled and travels over the group, which must be gloo. None is the default group.
    """
    answer: Any = None
    if dist.get_rank(group) == 0:
        try:
            answer = call()
        except TrainerError as error:
            answer = error
    values = [answer]
    dist.broadcast_object_list(values, group=group, group_src=0)
    if isinstance(values[0], TrainerError):
        raise values[0]
    return values[0]  # type: ignore[no-any-return]


def from_all(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's value, by rank, on all ranks of ``group``."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def anywhere(flag: Tensor) -> bool:
    """Whether ``flag``, a bool scalar, is true on some rank of the world: one all-reduce on its device."""
    number = flag.to(torch.int64)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number)
