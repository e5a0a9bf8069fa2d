"""One matrix product for each group of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

_ALIGNMENT = 16  # bytes that grouped_mm wants a row's length to be a multiple of


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, sizes: list[int] | None = None) -> Tensor:
    """The first ``counts[0]`` of ``rows`` (R, in) times the transpose of ``weight[0]`` (out, in), and so on: (R, out).

    ``counts`` is int64 and sums to R; ``sizes`` holds the same numbers where the host knows them, which spares the loop
    waiting for the device. A group may be empty.
    """
    if rows.shape[0] and has_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    y: Tensor = _Loop.apply(rows, weight, counts.tolist() if sizes is None else sizes)
    return y


def has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm does it: bfloat16 on GPUs from Ampere on, where it is one kernel; bfloat16 and float32
    on CPUs, where it is a loop too; with rows of whole 16 bytes.

    It wants gradients that are laid out as rows are, not expanded from fewer numbers.
    """
    if rows.is_cuda:
        known = rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    else:
        known = rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float32)
    aligned = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    return known and aligned and rows.dtype == weight.dtype


class _Loop(torch.autograd.Function):
    """The same for any type, size and device, a product at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        y = rows.new_empty(rows.shape[0], weight.shape[1])
        begin = 0
        for group, size in enumerate(sizes):
            mine = slice(begin, begin + size)
            torch.mm(rows[mine], weight[group].t(), out=y[mine])
            begin += size
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        begin = 0
        for group, size in enumerate(ctx.sizes):
            mine = slice(begin, begin + size)
            if grad_rows is not None:
                torch.mm(grad[mine], weight[group], out=grad_rows[mine])
            if grad_weight is not None:
                torch.mm(grad[mine].t(), rows[mine], out=grad_weight[group])  # zeros where the group is empty
            begin += size
        return grad_rows, grad_weight, None
