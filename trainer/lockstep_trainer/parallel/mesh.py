"""The ranks of a layout as device meshes and process groups.

Two meshes lie over the same ranks. Dense weights use (pipeline, replicate, fsdp, tensor), fsdp being shard × context;
the weights of experts use (pipeline, replicate, expert_shard, expert). The meshes are made from groups that this module
creates, one for each distinct set of ranks: torch's own way makes a group per axis even where two axes are the same
ranks, and gives all of them its default timeout instead of the job's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lockstep_trainer.parallel.layout import Coordinates, Layout

PIPELINE, REPLICATE, FSDP, TENSOR = "pipeline", "replicate", "fsdp", "tensor"
EXPERT_SHARD, EXPERT = "expert_shard", "expert"


@dataclass(frozen=True, slots=True)
class Meshes:
    """Meshes and groups that this rank belongs to. Groups of one rank exist, so that no caller needs a second case."""

    layout: Layout
    rank: int
    dense: DeviceMesh  # pipeline, replicate, fsdp, tensor
    experts: DeviceMesh  # pipeline, replicate, expert_shard, expert
    context: dist.ProcessGroup  # ranks that share a sequence
    pipeline: dist.ProcessGroup  # ranks that hold the stages of one copy of the model, first stage first
    tie: dist.ProcessGroup | None  # this rank's pair of first and last pipeline rank; None between them and without one

    @classmethod
    def build(cls, layout: Layout, device: torch.device, *, timeout: timedelta | None = None) -> Meshes:
        """All ranks of the world call it. Collectives give up after ``timeout``; None: as the world's group does.

        Raises ValueError where the world is not as large as the layout.
        """
        rank = dist.get_rank()
        if dist.get_world_size() != layout.world_size:
            raise ValueError(f"the layout has {layout.world_size} ranks and the world {dist.get_world_size()}")
        groups = _Groups(layout, rank, timeout or _timeout_of_the_world(device))
        order = torch.arange(layout.world_size)
        fsdp = layout.shard * layout.context
        meshes = cls(
            layout,
            rank,
            dense=_mesh(
                groups,
                device,
                order.view(layout.pipeline, layout.replicate, fsdp, layout.tensor),
                (PIPELINE, REPLICATE, FSDP, TENSOR),
            ),
            experts=_mesh(
                groups,
                device,
                order.view(layout.pipeline, layout.replicate, layout.expert_shard, layout.expert),
                (PIPELINE, REPLICATE, EXPERT_SHARD, EXPERT),
            ),
            context=groups.along(lambda at: at.context, order),
            pipeline=groups.along(lambda at: at.pipeline, order),
            tie=groups.ends(),
        )
        _keep_results({(key, group.group_name) for key, group in groups.made.items()})
        return meshes

    @property
    def at(self) -> Coordinates:
        """Where this rank is."""
        return self.layout.coordinates(self.rank)

    @property
    def tensor(self) -> DeviceMesh:
        """The axis of tensor parallelism."""
        return self.dense[TENSOR]

    @property
    def expert(self) -> DeviceMesh:
        """The axis over which whole experts are spread."""
        return self.experts[EXPERT]

    @property
    def fsdp(self) -> DeviceMesh:
        """What ``fully_shard`` takes for dense weights: (fsdp), or (replicate, fsdp) where there are copies."""
        return self.dense[(REPLICATE, FSDP)] if self.layout.replicate > 1 else self.dense[FSDP]

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """The same for the weights of experts."""
        if self.layout.replicate > 1:
            return self.experts[(REPLICATE, EXPERT_SHARD)]
        return self.experts[EXPERT_SHARD]


class _Groups:
    """Makes groups on first use; every rank must ask for the same axes in the same order."""

    def __init__(self, layout: Layout, rank: int, timeout: timedelta) -> None:
        self.layout, self.rank, self.timeout = layout, rank, timeout
        self.made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def split(self, rows: torch.Tensor) -> dist.ProcessGroup:
        """The group of this rank, where each row of ``rows`` (groups, ranks) is one; together they are the world."""
        key = tuple(tuple(row) for row in rows.tolist())
        if key not in self.made:
            self.made[key] = self._make(key)
        return self.made[key]

    def along(self, coordinate: Callable[[Coordinates], int], order: torch.Tensor) -> dist.ProcessGroup:
        """The group of the ranks that differ in one coordinate only."""
        size = 1 + max(coordinate(self.layout.coordinates(rank)) for rank in order.tolist())
        by_position = sorted(order.tolist(), key=lambda rank: coordinate(self.layout.coordinates(rank)))  # stable
        return self.split(torch.tensor(by_position).view(size, -1).T)

    def ends(self) -> dist.ProcessGroup | None:
        """This rank's pair of first and last pipeline rank."""
        stages, inner = self.layout.pipeline, self.layout.world_size // self.layout.pipeline
        if stages == 1:
            return None
        pairs: list[tuple[int, ...]] = [(at, at + (stages - 1) * inner) for at in range(inner)]
        if stages > 2:  # those between have no pair, and a split needs a group for each rank
            pairs += [(rank,) for rank in range(inner, (stages - 1) * inner)]
        key = tuple(pairs)
        if key not in self.made:
            self.made[key] = self._make(key)
        return self.made[key] if self.made[key].size() == 2 else None

    def _make(self, rows: Sequence[tuple[int, ...]]) -> dist.ProcessGroup:
        own = next(row for row in rows if self.rank in row)
        if len(own) == self.layout.world_size:
            world = dist.group.WORLD
            assert world is not None
            return world
        if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
            # NCCL with its device known: one split of the world's communicator, which all ranks take part in.
            group = dist.split_group(split_ranks=[list(row) for row in rows], timeout=self.timeout)
        else:
            group = dist.new_group(list(own), timeout=self.timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group


def _mesh(groups: _Groups, device: torch.device, order: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh whose cell (i, j, …) is the rank ``order[i, j, …]``."""
    axes = [groups.split(order.movedim(axis, -1).reshape(-1, order.shape[axis])) for axis in range(order.dim())]
    return DeviceMesh.from_group(axes, device.type, mesh=order, mesh_dim_names=names)


_named: set[tuple[tuple[tuple[int, ...], ...], str]] = set()
"""The groups of the meshes that this process built last: a process outlives its groups."""


def _keep_results(named: set[tuple[tuple[tuple[int, ...], ...], str]]) -> None:
    """DTensor remembers what an operation gives on a mesh, takes a mesh over the same ranks for the same one, and finds
    groups by their names. That is worth a good part of a second to a process that joins one generation after another;
    where a group has another name than last time, what is remembered is wrong."""
    if _named and _named != named:
        forget_results()
    _named.clear()
    _named.update(named)


def forget_results() -> None:
    """Let DTensor work out anew what operations give."""
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()


def _timeout_of_the_world(device: torch.device) -> timedelta:
    """How long the world's collectives on ``device`` wait: torch has no public way to read it back."""
    world = dist.group.WORLD
    assert world is not None
    timeout: timedelta = world._get_backend(device).options._timeout
    return timeout
