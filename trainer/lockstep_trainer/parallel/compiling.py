"""torch.compile, block by block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from lockstep_trainer.sections import Sections


def compile_blocks(part: nn.Module, backend: str = "inductor", *, split_backward: bool = False) -> None:
    """Compile the forward of each block of ``part.blocks``, for static shapes.

    Blocks of one shape share their code: it is compiled once for all of them. FSDP's hooks and the pipeline stay
    outside. Compiled code that breaks into pieces (at the exchange of tokens between experts) is allowed.
    ``split_backward``: some backward passes go through the same graph twice, for inputs and for weights. By its first
    backward pass, be that a whole one, compiled code decides to overwrite what it has saved; that is forbidden then.
    """
    if split_backward:
        from torch._functorch import config  # imports the compiler, as the first call does anyway

        config.donated_buffer = False
    blocks = part.blocks
    assert isinstance(blocks, nn.ModuleDict)
    for block in blocks.values():
        compiled = torch.compile(block.forward, backend=backend, dynamic=False)
        block.forward = partial(_with_arrived_input, compiled)


def watch_compilation(sections: Sections) -> Callable[[], None]:
    """Name what torch.compile does, whenever a step comes upon code or shapes that are new to it: section «compile».
    Within an evaluation it stays a part of that. Returns what ends it."""
    from torch._dynamo.callback import callback_handler  # imports the compiler, which takes 1.8 s

    running = ExitStack()

    def begin(_: object) -> None:
        if sections.current not in ("evaluate", "generate"):
            running.enter_context(sections("compile"))

    def end(_: object) -> None:
        running.close()

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)

    def forget() -> None:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)

    return forget


def _with_arrived_input(forward: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """Wait for ``x`` before compiled code gets it.

    An input that is still under way, as an embedding's whose rows tensor parallelism spreads is, loses its gradient in
    compiled code, without a word, from torch 2.12 on (pytorch#191113). A copy waits, and stays in the graph.
    """
    local = x._local_tensor if isinstance(x, DTensor) else x
    return forward(x.clone() if isinstance(local, AsyncCollectiveTensor) else x, *args)
