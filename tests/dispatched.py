"""What a rank does in a step, operation by operation, and which of it lies within measured windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Order:
    """In place of a clock: operations in the order in which this rank does them, and the windows between them. Several
    clocks may share what is ``done``."""

    def __init__(self, done: list[str] | None = None) -> None:
        self.done: list[str] = [] if done is None else done
        self.windows: list[tuple[int, int]] = []

    def mark(self) -> int:
        return len(self.done)

    def add(self, begun: int, ended: int) -> None:
        self.windows.append((begun, ended))

    def take(self) -> float:
        return 0.0

    def within(self) -> list[str]:
        places = {place for begun, ended in self.windows for place in range(begun, ended)}
        return [name for place, name in enumerate(self.done) if place in places]


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation, those that subclasses of tensors make of others by their parts."""

    def __init__(self, order: Order) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.order = order
        self.coming: set[int] = set()  # memory that a collective still writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        if name.endswith(".wait_tensor") and _memory(args[0]) not in self.coming:
            name = "arrived"  # each view of a result waits for it: all but the first for nothing
        self.order.done.append(name)
        result = func(*args, **(kwargs or {}))
        if name.endswith(".wait_tensor"):
            self.coming.discard(_memory(args[0]))
        elif func.namespace == "_c10d_functional":
            self.coming.add(_memory(result))
        return result


def _memory(tensor: Tensor) -> int:
    plain = tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor
    return plain.untyped_storage().data_ptr()


def communicates(name: str) -> bool:
    """FSDP's copies come behind its waiting, in the same hook."""
    return name.startswith(("c10d.", "_c10d_functional.", "fsdp."))
