"""A model and a loss of the user's own: ``model.module`` and ``recipe.loss``, put where the built-in ones would be.

docs/extending.md has the contracts.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lockstep_api.v1alpha1 import ModelSpec, RecipeSpec
from lockstep_trainer.agreement import from_all
from lockstep_trainer.batch import IGNORE
from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import call, load_callable
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.sharded import mixed_precision, sum_gradients

_MODEL, _LOSS = "trainer.model.module", "trainer.recipe.loss"
_SAMPLED = 64
"""Values of each parameter by which ranks see whether they have built the same model."""


# --- model ----------------------------------------------------------------------------------------------------------


def build_own_model(
    spec: ModelSpec,
    recipe: RecipeSpec,
    vocab_size: int,
    layout: Layout,
    meshes: Meshes,
    *,
    documents: bool,
    control: dist.ProcessGroup | None = None,
) -> nn.Module:
    """The user's model with its first values, sharded; the only part of an Engine.

    ``documents``: whether batches come with positions and documents. ``control``: a gloo group of all ranks. Every rank
    builds the whole model in CPU memory with the same seed and keeps its part: block by block where ``model.blocks`` is
    a list or dict of modules, which is then also gathered block by block. Raises UserError where the function is not
    there or returns something else, and where the job asks for more than data
    parallelism.
    """
    assert spec.module is not None
    _only_data_parallel(layout)
    for field, value in (("activationCheckpointing", recipe.activation_checkpointing), ("compile", recipe.compile)):
        if value not in ("none", False):
            raise UserError(f"trainer.recipe.{field}: it knows the built-in blocks only; do it in {_MODEL} yourself")
    if recipe.precision == "float8":
        raise UserError(f"trainer.recipe.precision: float8 with {_MODEL}; choose bf16 or fp32")
    if spec.init_from:
        raise UserError("trainer.model.initFrom: it reads weights of a preset; load your own in trainer.model.module")
    function = load_callable(spec.module, _MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = call(function, _MODEL, vocab_size, **spec.overrides)
    if not isinstance(model, nn.Module):
        raise UserError(f"{_MODEL}: {spec.module} returned a {type(model).__name__}; return a torch.nn.Module")
    _check(model, spec.module, documents)
    _check_same(model, spec.module, control)
    policy = mixed_precision(recipe.precision)
    for block in blocks_of(model):
        fully_shard(block, mesh=meshes.fsdp, mp_policy=policy)
    fully_shard(model, mesh=meshes.fsdp, mp_policy=policy, reshard_after_forward=False)
    sum_gradients(model)
    _check_first_logits(model, spec.module, vocab_size)
    return model


def _only_data_parallel(layout: Layout) -> None:
    for name in ("tensor", "pipeline", "context", "expert"):
        if (degree := getattr(layout, name)) > 1:
            raise UserError(
                f"parallelism.{name}: {degree} with trainer.model.module; a model of your own is data parallel only "
                "(replicate and shard), so leave it out"
            )


def _check(model: nn.Module, name: str, documents: bool) -> None:
    odd = [each for each, value in model.named_parameters() if value.is_floating_point() and value.dtype.itemsize < 4]
    if odd:
        raise UserError(
            f"{_MODEL}: {odd[0]} of {name} is not float32; leave parameters in float32, trainer.recipe.precision says "
            "what forward and backward use"
        )
    if not any(value.requires_grad for value in model.parameters()):
        raise UserError(f"{_MODEL}: the model of {name} has no parameters to train")
    named = {"positions": None, "documents": None} if documents else {}
    try:
        inspect.signature(model.forward).bind(None, **named)
    except TypeError:
        raise UserError(
            f"{_MODEL}: forward of {name} must take (tokens, positions, documents) with trainer.data.documentMask"
            if documents
            else f"{_MODEL}: forward of {name} must take (tokens)"
        ) from None


def _check_same(model: nn.Module, name: str, control: dist.ProcessGroup | None) -> None:
    """Replicas that begin with different weights would never notice."""
    digest = hashlib.sha256()
    for each, value in model.named_parameters():
        sample = value.detach().flatten()[:: max(1, value.numel() // _SAMPLED)]
        digest.update(f"{each} {tuple(value.shape)} {sample.tolist()}".encode())
    seen = from_all(digest.hexdigest(), control)
    odd = [rank for rank, each in enumerate(seen) if each != seen[0]]
    if odd:
        raise UserError(
            f"{_MODEL}: {name} built another model on rank {odd[0]} than on rank 0; draw first values from torch's own "
            "generator, which has the same seed everywhere"
        )


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a model of the user's own, each of which is gathered when it runs; none where it names none."""
    blocks: Any = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleDict):
        return list(blocks.values())
    return list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []


def _check_first_logits(model: nn.Module, name: str, vocab_size: int) -> None:
    """Once, behind the first forward pass."""

    def look(_: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
        handle.remove()
        expected = (*inputs[0].shape, vocab_size)
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != expected:
            raise UserError(
                f"{_MODEL}: forward of {name} gave {found}; it must give logits of {expected}: samples, tokens, "
                "vocabulary"
            )

    handle = model.register_forward_hook(look)


# --- loss -----------------------------------------------------------------------------------------------------------


def own_loss(recipe: RecipeSpec, group: dist.ProcessGroup | None) -> OwnLoss:
    """The loss that ``recipe.loss`` names. ``group``: ranks with a part of the vocabulary each, of the same tokens.

    Raises UserError where it is not there, and with a z-loss, which belongs to the built-in one.
    """
    assert recipe.loss is not None
    if recipe.z_loss:
        raise UserError("trainer.recipe.zLoss: it belongs to the built-in loss; add it in trainer.recipe.loss yourself")
    return OwnLoss(recipe.loss, load_callable(recipe.loss, _LOSS), group)


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """Calls the user's function with whole logits, in float32 at least, of the tokens that have a target."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    group: dist.ProcessGroup | None = None

    def __call__(self, logits: Tensor, targets: Tensor, denominator: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """As ``lockstep_trainer.loss.Loss``; the second of the sums is 0."""
        whole = logits.flatten(0, -2)
        if self.group is not None and self.group.size() > 1:
            whole = _WholeVocabulary.apply(whole, self.group)
        flat = targets.flatten()
        counted = flat != IGNORE
        if not counted.all():
            whole, flat = whole[counted], flat[counted]
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
        # Where no token has a loss, the backward pass is collective all the same.
        total = self.function(whole, flat) if len(flat) else whole.sum() * 0
        if not isinstance(total, Tensor) or total.shape != ():
            what = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise UserError(f"{_LOSS}: {self.name} returned {what}; return the sum over the tokens, a scalar tensor")
        sums = torch.stack([total.detach().double(), torch.zeros((), dtype=torch.float64, device=total.device)])
        return total / denominator, sums


class _WholeVocabulary(torch.autograd.Function):
    """(N, V / ranks) → (N, V). All ranks compute the same loss from it, so each has its part's gradient already."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, part.shape[-1]
        parts = part.new_empty(group.size(), *part.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), part.contiguous(), group=group)
        return parts.transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, ctx.group.rank() * ctx.width, ctx.width).contiguous(), None
