"""Expert parallel: whole experts are spread over ranks, and tokens travel to them.

``expert`` neighbours of shard × context × tensor share the experts of a layer: E / n of them on each of n ranks.
Every rank routes the tokens that it has at hand (behind sequence parallel: its share of the sequence), sends a copy of
each to the ranks of its k experts and gets the results back, both by an all-to-all. Per layer a rank sends and receives
k·N·dim elements twice in the forward pass and twice in the backward pass, (n − 1)/n of them to others where routing is
balanced. No rank drops tokens, so a rank whose experts are popular has more to do and to keep; ``Balance.worst`` says
how much.

What is not an expert is not split by tensor parallel here: router and shared expert are whole on each rank and see its
tokens only, so that their gradients are sums over the tensor axis too. For a shared expert, far narrower than a dense
layer as a rule, this spares the sequence being gathered and scattered in each layer, and its products stay as wide as
they are. The price is memory: it is sharded over shard × context, and not over tensor.

How many rows go where decides the shapes of what follows, so the host must know it: it waits once per layer and forward
pass, in ``ExpertExchange.forward``, while the device computes the shared expert. A compiled block has a break there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.moe import Exchange, Experts, MoE, invert, reorder
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

_collectives = torch.ops._c10d_functional


def mixtures(parts: Iterable[nn.Module]) -> list[MoE]:
    """The mixture layers of ``parts``, in order."""
    return [module for part in parts for module in part.modules() if isinstance(module, MoE)]


def apply_experts(part: Decoder, layout: Layout, meshes: Meshes) -> None:
    """Spread the experts of ``part`` over their ranks. Comes before FSDP, which shards ``experts`` over
    ``meshes.expert_fsdp`` and the rest over ``meshes.fsdp``."""
    for layer in mixtures([part]):
        if layout.tensor > 1:
            # A sequence-parallel weight's gradient is a sum over the axis, which FSDP asks for before it reduces.
            matrices = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
            plan: dict[str, ParallelStyle] = {
                name: SequenceParallel(sequence_dim=0, use_local_output=True) for name in matrices
            }
            parallelize_module(layer, meshes.tensor, plan)
        if layout.expert > 1:
            _spread(layer.experts, meshes.expert)
            layer.exchange = ExpertExchange(meshes.expert.get_group())


def _spread(experts: Experts, mesh: DeviceMesh) -> None:
    """Leave this rank its experts, and the weights their names and whole shapes, so that checkpoints reshard."""
    for name, weight in list(experts.named_parameters()):
        shards = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(shards, requires_grad=weight.requires_grad))

    def weights() -> tuple[Tensor | None, Tensor, Tensor]:
        gate, up, down = Experts.weights(experts)
        return None if gate is None else _local(gate), _local(up), _local(down)

    experts.weights = weights  # type: ignore[method-assign]


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


# ---------------------------------------------------------------------------------------------- the exchange


@dataclass(frozen=True, slots=True)
class Plan:
    """How many rows go where. n ranks of the group, E / n experts on each."""

    arriving: Tensor  # (n, E / n): rows from each rank for each expert of this one
    host: Tensor  # (2, n, E / n): what this rank sends, and ``arriving``; on the host once ``copied`` has passed
    copied: torch.cuda.Event | None


class ExpertExchange(Exchange):
    """Rows go to the ranks of their experts and their results come back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.ranks, self.name = group.size(), group.group_name

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def plan(self, counts: Tensor) -> Plan:
        """Tell the other ranks how many rows come, and begin to tell the host."""
        leaving = counts.view(self.ranks, -1)
        equal = [1] * self.ranks
        arriving = _all_to_all(leaving, equal, equal, self.name)
        both = torch.stack((leaving, arriving))
        if not both.is_cuda:
            return Plan(arriving, both, None)
        host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True).copy_(both, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return Plan(arriving, host, copied)

    @partial(torch.compiler.disable, recursive=False)  # the experts themselves may be compiled
    def forward(self, experts: nn.Module, rows: Tensor, plan: Plan) -> Tensor:
        """What the experts make of ``rows``, (R, dim) → (R, dim), in the same order."""
        if plan.copied is not None:
            plan.copied.synchronize()  # the one place where the host waits
        leaving, arriving = plan.host.unbind()
        to_each, from_each = leaving.sum(1).tolist(), arriving.sum(1).tolist()
        sizes: list[int] = arriving.sum(0).tolist()

        rows = _AllToAll.apply(rows, from_each, to_each, self.name)
        expert = torch.arange(len(sizes), device=rows.device).repeat(self.ranks)
        expert = expert.repeat_interleave(plan.arriving.flatten(), output_size=sum(sizes))
        order = expert.sort(stable=True).indices  # from (rank, expert) to (expert, rank)
        back = invert(order)
        rows = experts(reorder(rows, order, back), plan.arriving.sum(0), sizes)
        y: Tensor = _AllToAll.apply(reorder(rows, back, order), to_each, from_each, self.name)
        return y


def _all_to_all(rows: Tensor, arriving: Sequence[int], leaving: Sequence[int], group: str) -> Tensor:
    sent = _collectives.all_to_all_single(rows.contiguous(), arriving, leaving, group)
    y: Tensor = _collectives.wait_tensor(sent)
    return y


class _AllToAll(torch.autograd.Function):
    """``leaving[i]`` rows go to the i-th rank of the group, ``arriving[i]`` come from it; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arriving: list[int], leaving: list[int], group: str) -> Tensor:
        ctx.arriving, ctx.leaving, ctx.group = arriving, leaving, group
        return _all_to_all(rows, arriving, leaving, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.leaving, ctx.arriving, ctx.group), None, None, None


# ------------------------------------------------------------------------------------------------- balance


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly the experts were used in a step."""

    worst: (
        Tensor  # float64 scalar: tokens of the busiest expert over the mean of its layer, highest layer; 0: no experts
    )


@torch.no_grad()
def update_balance(parts: Sequence[nn.Module], meshes: Meshes) -> Balance:
    """Move each layer's ``router_bias`` towards even use and begin to count anew. All ranks call it behind the
    optimizer's step.

    bias += balance_rate · sign(mean − tokens of the expert in this step, over all ranks) (Wang et al. 2024, alg. 1).
    Counts are integers, so all ranks get the same bits. ``Balance.worst`` is about the layers of this pipeline rank.
    """
    layers = mixtures(parts)
    if not layers:
        return Balance(torch.zeros((), dtype=torch.float64, device=meshes.dense.device_type))
    tokens = torch.stack([layer.expert_tokens for layer in layers])  # layers, E
    for axis in ("replicate", "expert_shard", "expert"):  # together: all ranks with these layers, each token once
        group = meshes.experts[axis].get_group()
        if group.size() > 1:
            dist.all_reduce(tokens, group=group)
    total, experts = tokens.sum(1, keepdim=True), tokens.shape[1]
    short = torch.sign(total - tokens * experts)
    for layer, sign in zip(layers, short, strict=True):
        if layer.router_bias is not None:
            layer.router_bias += layer.balance_rate * sign.to(layer.router_bias.dtype)
        layer.expert_tokens.zero_()
    return Balance((tokens.amax(1) * experts / total[:, 0].clamp(min=1)).max().double())
