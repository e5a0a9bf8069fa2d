"""Settings of the process that keep single ranks from being late.

In a step all ranks wait for the slowest. What a process does now and then at a moment of its own (collecting garbage,
asking the driver for memory) costs each step the worst of all ranks; done by all in the same step it costs once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

GARBAGE_EVERY = 100
"""Steps between collections of garbage."""

ALLOCATOR = "expandable_segments:True"
"""Segments of device memory that grow, in place of new ones: where activations change their size from step to step
(documents, experts) the allocator is else left with free blocks that fit nothing, and asks the driver again, for which
the device stands still."""
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name up to torch 2.9


def set_allocator(device: torch.device) -> None:
    """Let device memory grow in place; before the first tensor on ``device``. What the pod template sets in torch's
    variables counts, and on a CPU there is nothing to set.

    By a call and not by a variable: torch may have read its variables in the process that this one was forked from.
    """
    if device.type == "cuda" and not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR)


def make_deterministic() -> None:
    """Ask for kernels that give the same bits for the same inputs; before the first kernel.

    torch only warns where there is none: not everything beside the steps has one. Attention on GPUs is among what it
    warns of, and must be asked for with ``refusing``. cuDNN's attention is slower than the flash kernel then (an H200,
    torch 2.11, a small decoder: 56 and 46 ms a step; in any order 37).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS sums in a changing order
    # Not use_deterministic_algorithms: it imports the compiler, 1.8 s that each worker would pay after its fork.
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def refusing(active: bool) -> Iterator[None]:
    """Within it, where ``active``: what has no kernel that gives the same bits raises RuntimeError, and attention takes
    its own. Without it three quarters of a decoder's gradients differ from one repetition to the next (an H100)."""
    if not active:
        yield
        return
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("warn")


def refused(error: BaseException) -> bool:
    """Whether torch says that an operation has no deterministic kernel."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)


class Garbage:
    """Collects garbage at the same step on all ranks, instead of whenever a counter of this process runs full."""

    def __init__(self, every: int = GARBAGE_EVERY) -> None:
        """``every``: steps between collections."""
        self._every = every
        self._froze = False

    def take_over(self) -> None:
        """Stop Python's own collections. What start-up left is never looked at again: modules and code stay anyway.

        Where the process was forked from one that did that, only the model came since, which must go with its
        generation: it stays in sight.
        """
        gc.disable()
        gc.collect()
        self._froze = not gc.get_freeze_count()
        if self._froze:
            gc.freeze()

    def give_back(self) -> None:
        """Let Python collect by itself again, for a process that goes on with something else."""
        if self._froze:
            gc.unfreeze()
        gc.enable()

    def due(self, step: int) -> bool:
        """Whether it is collected behind step ``step``: the same steps on all ranks, whenever they started."""
        return step % self._every == 0

    def collect(self) -> int:
        """Collect now; returns the number of objects that were unreachable."""
        return gc.collect()
