"""Context parallel: each rank holds a part of every sequence; attention is where the parts meet.

Two methods. Shapes in comments: B samples, H query heads, K key-value heads, E width of a head, S positions of the
whole sequence, T = S / n of them on each of n ranks.

**allGather.** Every rank gathers the keys and values of all (backward: a reduce-scatter of their gradients) and
computes its own queries. The sequence is cut into 2n chunks and rank r holds chunks r and 2n − 1 − r, so that all ranks
see equally many keys; each chunk of queries reads the keys up to its own end and no more. Per layer, forward: a rank
receives 2·B·K·(S − T)·E elements, and as many gradients in backward. The gathered keys and values live until backward,
unless activations are recomputed in full (selective recomputation keeps what collectives gave).

**ulysses** (Jacobs et al. 2023). An all-to-all gives each rank the whole sequence of H / n of the heads, another one
brings the results back. Per layer a rank receives B·(2H + 2K)·T·E·(n − 1)/n elements, forward as backward: less than
allGather where H/K < n − 1. It needs K divisible by n.

The collectives are functional (``torch.ops._c10d_functional``), in autograd functions of our own: a compiled block goes
through them without a break, on torch 2.11 as on 2.15.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from lockstep_trainer.errors import UserError
from lockstep_trainer.model.attention import Core, Places
from lockstep_trainer.model.decoder import Block, Decoder
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes

_collectives = torch.ops._c10d_functional


def apply_context(part: Decoder, layout: Layout, meshes: Meshes) -> None:
    """Let the tokens that ``part`` gets be a rank's share of the sequence, as ``local`` cuts it. Comes behind tensor
    parallelism, which says which heads the rank has. Nothing where context is 1."""
    if layout.context == 1:
        return
    group = meshes.context
    ulysses = layout.context_method == "ulysses"
    part.places = UlyssesPlaces(group) if ulysses else GatheredPlaces(group)
    for block in part.blocks.values():
        attention = cast(Block, block).attention
        attention.core = UlyssesCore(group) if ulysses else GatheredCore(group)
        if ulysses:
            attention.core_heads = part.config.heads // (layout.tensor * layout.context)
            attention.first_head += group.rank() * attention.core_heads


# ------------------------------------------------------------------------------------ which tokens are where


def held(rank: int, ranks: int) -> tuple[int, int]:
    """Which two of the 2 × ``ranks`` chunks of a sequence the ``rank``-th of its ranks holds with allGather."""
    return rank, 2 * ranks - 1 - rank


def local(tensor: Tensor, layout: Layout, rank: int, dim: int = 1) -> Tensor:
    """What the job's rank ``rank`` holds of a tensor with the whole sequence along ``dim``, (B, S, …) → (B, T, …).

    Raises UserError where the sequence can't be cut into equal parts.
    """
    ranks = layout.context
    if ranks == 1:
        return tensor
    pieces = ranks if layout.context_method == "ulysses" else 2 * ranks
    if tensor.shape[dim] % pieces:
        raise UserError(
            f"parallelism.context: {ranks} ranks cut a sequence into {pieces} equal parts, and {tensor.shape[dim]} "
            f"tokens are no multiple of it; change trainer.data.sequenceLength or parallelism.context"
        )
    at = layout.coordinates(rank).context
    chunks = tensor.chunk(pieces, dim)
    if layout.context_method == "ulysses":
        return chunks[at].contiguous()
    return torch.cat([chunks[number] for number in held(at, ranks)], dim)


def restore(shares: Sequence[Tensor], layout: Layout, dim: int = 1) -> Tensor:
    """The whole sequence from the shares of all its ranks, in the order of their context coordinate."""
    ranks = layout.context
    assert len(shares) == ranks
    if ranks == 1 or layout.context_method == "ulysses":
        return torch.cat(list(shares), dim)
    chunks = [half for share in shares for half in share.chunk(2, dim)]
    return torch.cat([chunks[number] for number in _natural(ranks)], dim)


def _natural(ranks: int) -> list[int]:
    """Where each chunk of the sequence is among the chunks of all ranks, one rank's behind the other's."""
    stored = [chunk for rank in range(ranks) for chunk in held(rank, ranks)]
    return [stored.index(chunk) for chunk in range(2 * ranks)]


# ---------------------------------------------------------------------------------------------- all-gather


class GatheredPlaces(Places):
    """Two chunks of the sequence are at hand; keys come from all of it, in order."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.rank, self.ranks, self.name = group.rank(), group.size(), group.group_name

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the tokens at hand, (T,)."""
        chunk = length // 2
        within = torch.arange(chunk, device=device)
        return torch.cat([within + number * chunk for number in held(self.rank, self.ranks)])

    def pairs(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions and documents of the queries at hand, then of all keys: gathered once for all layers."""
        k_at, k_doc = self._all(positions, documents)
        return positions, documents, k_at, k_doc

    def _all(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack((positions, documents))  # 2, …, T
        parts = _gather(both[None], self.ranks, self.name)  # n, 2, …, T
        chunks = [half for part in parts for half in part.chunk(2, -1)]
        k_at, k_doc = torch.cat([chunks[number] for number in _natural(self.ranks)], -1)
        return k_at, k_doc


class GatheredCore(Core):
    """Attention of two chunks of queries to the keys and values of the whole sequence."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.rank, self.ranks, self.name = group.rank(), group.size(), group.group_name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, H, T, E), key and value (B, K, T, E) → (B, H, T, E); ``mask`` is (B or 1, 1 or H, T, S) or None."""
        key, value = self.exchange(key, value)
        chunk = query.shape[2] // 2
        mixed = []
        for half, number in enumerate(held(self.rank, self.ranks)):
            end = (number + 1) * chunk  # what comes behind is seen by none of these queries, whatever the mask
            rows = slice(half * chunk, (half + 1) * chunk)
            seen = None if mask is None else mask[:, :, rows, :end]
            mixed.append(prefix_attention(query[:, :, rows], key[:, :, :end], value[:, :, :end], seen))
        return torch.cat(mixed, 2)

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's keys and values, (B, K, T, E) each, to those of the whole sequence, (B, K, S, E)."""
        return cast(tuple[Tensor, Tensor], _GatherKeysValues.apply(key, value, self.ranks, self.name))


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, H, c, E) queries that are the last c of the keys' positions; no mask: causal order.

    ``scaled_dot_product_attention`` aligns its own causal order with the first key. On GPUs the flash kernel is called
    by its name, since there it aligns with the last one (what ``torch.nn.attention.bias.causal_lower_right`` relies on;
    building that one breaks a compiled graph). Elsewhere a (c, keys) mask says it.
    """
    grouped = query.shape[1] != key.shape[1]
    length, keys = query.shape[2], key.shape[2]
    if mask is None and length != keys:
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] in range(8, 257, 8):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return cast(Tensor, flash(query, key, value, 0.0, is_causal=True)[0])
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)


class _GatherKeysValues(Function):
    """Keys and values of two chunks, (B, K, T, E) each, to those of the whole sequence in order, (B, K, S, E)."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, ranks: int, name: str) -> tuple[Tensor, Tensor]:
        ctx.ranks, ctx.name = ranks, name
        halves = torch.stack((key, value)).chunk(2, 3)
        chunks = _gather(torch.stack(halves), ranks, name)  # 2n, 2, B, K, c, E
        key, value = torch.cat([chunks[number] for number in _natural(ranks)], 3)
        return key, value

    @staticmethod
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chunks = [
            torch.stack(pair) for pair in zip(key.chunk(2 * ctx.ranks, 2), value.chunk(2 * ctx.ranks, 2), strict=True)
        ]
        sent = torch.stack([chunks[number] for rank in range(ctx.ranks) for number in held(rank, ctx.ranks)])
        # NCCL adds in the gradients' own type; a sum of n terms in bfloat16 is what grouped queries do as well.
        summed = _collectives.reduce_scatter_tensor(sent, "sum", ctx.ranks, ctx.name)
        halves = _collectives.wait_tensor(summed)  # 2, 2, B, K, c, E
        key, value = torch.cat(tuple(halves), 3)
        return key, value, None, None


def _gather(tensor: Tensor, ranks: int, name: str) -> Tensor:
    """The ranks' tensors behind each other along the first dimension."""
    return cast(Tensor, _collectives.wait_tensor(_collectives.all_gather_into_tensor(tensor.contiguous(), ranks, name)))


# ------------------------------------------------------------------------------------------------- Ulysses


class UlyssesPlaces(Places):
    """One piece of the sequence is at hand, but the core sees all of it."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.rank, self.ranks, self.name = group.rank(), group.size(), group.group_name

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Positions of the tokens at hand, (T,)."""
        return torch.arange(self.rank * length, (self.rank + 1) * length, device=device)

    def pairs(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions and documents of all queries and of all keys: gathered once for all layers."""
        parts = _gather(torch.stack((positions, documents))[None], self.ranks, self.name)  # n, 2, …, T
        at, doc = torch.cat(tuple(parts), -1)
        return at, doc, at, doc


class UlyssesCore(Core):
    """Attention of a part of the heads over the whole sequence."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.ranks, self.name = group.size(), group.group_name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, H, T, E), key and value (B, K, T, E) → (B, H, T, E); ``mask`` is (B or 1, 1 or H / n, S, S) or
        None."""
        n, heads, kv_heads = self.ranks, query.shape[1] // self.ranks, key.shape[1] // self.ranks
        # Rank r's heads are the r-th part of the queries' and of the keys': groups of queries stay with their key.
        parts = [torch.unflatten(x, 1, (n, -1)) for x in (query, key, value)]  # B, n, heads, T, E
        sent = torch.cat(parts, 2).transpose(0, 1)  # n, B, heads of all three, T, E
        received = self.exchange(sent)
        whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # B, heads of all three, S, E
        query, key, value = torch.split(whole, [heads, kv_heads, kv_heads], 1)
        mixed = super().forward(query, key, value, mask)  # B, H / n, S, E
        back = torch.unflatten(mixed, 2, (n, -1)).permute(2, 0, 1, 3, 4)  # n, B, H / n, T, E
        returned = self.exchange(back)
        return returned.transpose(0, 1).flatten(1, 2)

    def exchange(self, rows: Tensor) -> Tensor:
        """The i-th row (first dimension) goes to rank i; the j-th row of the result came from rank j."""
        return cast(Tensor, _AllToAll.apply(rows, self.name))


class _AllToAll(Function):
    """The i-th row (first dimension) goes to rank i; the j-th row of the result came from rank j."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, name: str) -> Tensor:
        ctx.name = name
        return _exchange(rows, name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.name), None


def _exchange(rows: Tensor, name: str) -> Tensor:
    one_each = [1] * rows.shape[0]
    sent = rows.contiguous()
    return cast(Tensor, _collectives.wait_tensor(_collectives.all_to_all_single(sent, one_each, one_each, name)))
