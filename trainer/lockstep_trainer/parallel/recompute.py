"""Activation checkpointing: what the backward pass computes again instead of finding it in memory.

A block's ``forward`` is wrapped as an attribute of the instance: parameters keep their names, and FSDP's hooks, which
sit on the module's call, stay outside and gather the weights again before anything is recomputed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

# By name, since not every build of torch has each: matrix products, the kernels of attention, and collectives.
_KEPT = (
    "aten.mm",
    "aten.bmm",
    "aten.addmm",
    "aten.baddbmm",
    "aten._grouped_mm",
    "aten._scaled_mm",
    "aten._scaled_grouped_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    # Only collectives that return their result: one that fills a given buffer must run again on the new buffer.
    # wait_tensor runs again too; on a kept result, which has arrived long ago, it does nothing.
    "_c10d_functional.all_gather_into_tensor",
    "_c10d_functional.reduce_scatter_tensor",
    "_c10d_functional.all_reduce",
    "_c10d_functional.all_to_all_single",
    "_dtensor.shard_dim_alltoall",
)


def recompute_blocks(part: nn.Module, mode: Recompute) -> None:
    """Recompute in the backward pass of each block of ``part.blocks``: nothing (none), everything behind the block's
    input (full), or what is cheap (selective): results of matrix products, attention and collectives are kept, and
    norms, activations and sums computed again.

    A block's forward then runs twice, so it must not count anything on the side. Raises ValueError for another mode.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"{mode!r} is none of {', '.join(get_args(Recompute))}")
    if mode == "none":
        return
    blocks = part.blocks
    assert isinstance(blocks, nn.ModuleDict)
    for block in blocks.values():
        block.forward = partial(_selective if mode == "selective" else _full, block.forward)


def _full(forward: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False)


def _selective(forward: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():  # the compiler knows torch's own contexts only
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_compiled_contexts)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)


# --- keeping results -------------------------------------------------------------------------------------------------
#
# torch's own contexts give each kept result away once. A pipeline schedule that computes the gradients of inputs and
# of weights apart repeats a block for each of them, so these keep their results as long as the graph lives.

_Kept = dict[Any, list[Any]]  # operator → its results in order


def _contexts() -> tuple[_Keep, _Reuse]:
    kept: _Kept = defaultdict(list)
    return _Keep(kept), _Reuse(kept)


def _compiled_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _kept_operators() -> frozenset[Any]:
    found: set[Any] = set()
    for name in _KEPT:
        namespace, operator = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found.update(getattr(packet, overload) for overload in packet.overloads() if overload != "out")
    return frozenset(found)


_OPERATORS = _kept_operators()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The first run: results of the operators to keep, in order."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _OPERATORS:
            self._kept[func].append(tree_map(_version, result))
        return result


class _Reuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A repetition: the kept results in the same order, and everything else computed."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._used: dict[Any, int] = {}

    def __enter__(self) -> _Reuse:
        self._used = defaultdict(int)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _OPERATORS:
            return func(*args, **(kwargs or {}))
        number = self._used[func]
        self._used[func] += 1
        if number >= len(self._kept[func]):
            raise RuntimeError(f"selective recomputation met {func} more often than the forward pass did")
        return tree_map(_unchanged, self._kept[func][number])


class _Version:
    """A kept result and the version of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        # Below autograd a detached tensor does not share its source's version counter unless it is asked for.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version


def _version(value: Any) -> Any:
    return _Version(value) if isinstance(value, Tensor) else value


def _unchanged(value: Any) -> Any:
    if not isinstance(value, _Version):
        return value
    if value.tensor._version != value.version:
        raise RuntimeError(
            "selective recomputation can't keep a result that the forward pass then changed in place; "
            "use another operation there, or activationCheckpointing full"
        )
    return value.tensor
