"""A mixture of experts in place of the dense feed-forward part (Shazeer et al. 2017), without capacity limits: no token
is dropped.

Shapes in comments: N tokens at hand, k experts per token, E experts of the layer, R rows that experts see (N·k where
all experts are at hand). Rows are copies of tokens in the order of their experts.

The same input gives the same bits: tokens are moved by gathers only, in the backward pass too, and never added up in
an order that the device chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor, nn

from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.feedforward import ACTIVATIONS, FeedForward
from lockstep_trainer.model.grouped import grouped_linear


class Router(nn.Linear):
    """A score of each expert for each token, computed in float32 at least."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.dim, config.experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim) → (N, E), float32, or float64 where ``x`` is."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """The experts of a layer. Weights are (E, out, in), each expert's the weight of an ``nn.Linear``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        experts, dim, width = config.experts, config.dim, config.expert_dim or config.ffn_dim
        self.gate = nn.Parameter(torch.empty(experts, width, dim)) if config.gated else None
        self.up = nn.Parameter(torch.empty(experts, width, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, width))
        self._activation = ACTIVATIONS[config.activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights that ``nn.Linear`` would draw."""
        for weight in self.parameters():
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate, up and down of the experts at hand, as plain tensors. Expert parallelism puts another in its place."""
        return self.gate, self.up, self.down

    def forward(self, rows: Tensor, counts: Tensor, sizes: list[int] | None = None) -> Tensor:
        """(R, dim) → (R, dim): the first ``counts[0]`` rows through the first expert at hand, and so on.

        ``counts`` is int64; ``sizes`` holds the same numbers where the host knows them already.
        """
        gate, up, down = self.weights()
        inside = grouped_linear(rows, up, counts, sizes)
        if gate is None:
            inside = self._activation(inside)
        else:
            inside = self._activation(grouped_linear(rows, gate, counts, sizes)) * inside
        return grouped_linear(inside, down, counts, sizes)


class Exchange(nn.Module):
    """Brings rows to their experts and back. This one has all experts at hand. Expert parallelism puts another in its
    place."""

    def plan(self, counts: Tensor) -> Any:
        """What can be begun once it is known how many rows each expert gets, (E,) int64."""
        return counts

    def forward(self, experts: nn.Module, rows: Tensor, plan: Any) -> Tensor:
        """What the experts make of ``rows``, (R, dim) → (R, dim), in the same order."""
        y: Tensor = experts(rows, plan)
        return y


class MoE(nn.Module):
    """Each token goes through its k best experts, and through the shared one where there is one.

    ``router_bias`` balances the experts without a term in the loss (Wang et al. 2024, as in DeepSeek-V3): it is added
    to the scores when experts are chosen, not when their outputs are weighed. ``update_balance`` moves it. It is part
    of a checkpoint; there is none where ``balance_rate`` is 0.
    """

    router_bias: Tensor | None
    expert_tokens: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config, config.shared_expert_dim) if config.shared_expert_dim else None
        self.exchange = Exchange()
        self.balance_rate = config.balance_rate
        self._config = config
        balanced = config.balance_rate > 0
        self.register_buffer("router_bias", torch.zeros(config.experts, dtype=torch.float32) if balanced else None)
        self.register_buffer("expert_tokens", torch.zeros(config.experts, dtype=torch.int64), persistent=False)

    def reset_buffers(self) -> None:
        """Give the buffers the values of a fresh layer, after their memory was allocated without any."""
        if self.router_bias is not None:
            self.router_bias.zero_()
        self.expert_tokens.zero_()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights, (N, k) both; weights in the precision of the router.

        With softmax and ``normalize_routing`` this is Mixtral's rule (a softmax over the chosen scores) and
        Qwen3-MoE's; with sigmoid it is DeepSeek-V3's.
        """
        scores = self.router(x)
        affinity = scores.softmax(-1) if self._config.routing == "softmax" else scores.sigmoid()
        with torch.no_grad():
            preference = affinity if self.router_bias is None else affinity + self.router_bias
            chosen = preference.topk(self._config.experts_per_token, dim=-1).indices
        weights = affinity.gather(-1, chosen)
        if self._config.normalize_routing:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may underflow to 0
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        by_expert, order = chosen.flatten().sort(stable=True)
        counts = _counts(by_expert, self._config.experts)
        plan = self.exchange.plan(counts)
        shared = None if self.shared is None else self.shared(tokens)  # the device's work while the host learns counts
        back = invert(order)
        rows: Tensor = _Spread.apply(tokens, order, back, self._config.experts_per_token)
        rows = self.exchange(self.experts, rows, plan)
        rows = reorder(rows, back, order).view(*weights.shape, tokens.shape[1])  # N, k, dim
        if self.training:
            weights = _count(weights, counts, self.expert_tokens)
        y = torch.bmm(weights.to(rows.dtype)[:, None], rows)[:, 0]
        y = y if shared is None else y + shared
        return y.view_as(x)


def _counts(by_expert: Tensor, experts: int) -> Tensor:
    """How often each of 0 … experts − 1 occurs in the sorted ``by_expert``: (E,) int64, without asking the host."""
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=by_expert.device), right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


def invert(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return back


def reorder(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """``rows[order]``, ``back`` being the inverse of ``order``."""
    y: Tensor = _Reorder.apply(rows, order, back)
    return y


class _Reorder(torch.autograd.Function):
    """A permutation whose backward pass is a gather too. Autograd's own would add with atomics, in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back], None, None


class _Spread(torch.autograd.Function):
    """Tokens (N, dim) to rows (N·k, dim): k copies of each, permuted."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return tokens[order // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back].view(grad.shape[0] // ctx.copies, ctx.copies, grad.shape[1]).sum(1), None, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled backward pass would lose the count
def _count(weights: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    y: Tensor = _Counted.apply(weights, counts, total)
    return y


class _Counted(torch.autograd.Function):
    """The identity. Its backward pass adds ``counts`` to ``total``.

    Behind a forward pass there is at most one backward pass: evaluation has none, and what activation checkpointing
    computes a second time has none of its own. So each token of a step is counted once.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, counts: Tensor, total: Tensor) -> Tensor:
        ctx.counts, ctx.total = counts, total
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.total += ctx.counts
        return grad, None, None
