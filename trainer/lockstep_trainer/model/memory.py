"""Bytes of GPU memory that training needs at a layout, by formula: without torch, and without allocating anything.

What counts is what Lockstep stores. Weights are float32, sharded over fsdp × tensor (experts over all ranks of a
stage); gathered for use in bfloat16, a block at a time, with a pipeline all at once. Gradients are float32 and sharded;
while micro-batches are accumulated they are whole. AdamW keeps two float32 moments, Muon one for the matrices of layers
and two for the rest.

Activations are counted tensor by tensor after Korthikanti et al. 2022 («Reducing Activation Recomputation in Large
Transformer Models», section 4), for this decoder: no dropout, attention by a flash kernel, and so no term for scores.
``tests/unit/trainer/test_model_memory.py`` holds them to what autograd keeps. Experts are taken to be evenly loaded.

RMSNorm is taken to be one kernel that keeps its input, as it is on GPUs.

Not counted: CUDA's context, buffers of NCCL and the allocator's fragmentation, some 2 to 5 GiB together; what attention
needs with a mask (ALiBi, documents, windows), which is (T, T) per sample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lockstep_trainer.model.config import Activation, DecoderConfig
from lockstep_trainer.model.weights import Weight, is_expert, layer_weights, weights
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.stages import modelled_costs, split_layers

Recompute = Literal["none", "selective", "full"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True)
class Work:
    """What runs at a layout, as far as memory depends on it."""

    sequence_length: int
    micro_batch: int = 1  # samples of one forward pass
    micro_batches: int = 1  # of a step
    recompute: Recompute = "none"
    optimizer: Optimizer = "adamw"
    precision: Literal["bf16", "fp32"] = "bf16"

    @property
    def bytes_per_element(self) -> int:
        """Of activations and of gathered weights."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    parameters: int
    gathered: int  # weights put together for use
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it at once, which is a little more than ever happens."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_by_pipeline_rank(config: DecoderConfig, layout: Layout, work: Work) -> tuple[Memory, ...]:
    """What each pipeline rank needs on each of its GPUs, layers split as the trainer does by modelled cost."""
    costs = modelled_costs(config, work.sequence_length, recompute=work.recompute)
    split = split_layers(costs, layout.stages)
    return tuple(_rank_memory(config, layout, work, rank, split) for rank in range(layout.pipeline))


def _rank_memory(config: DecoderConfig, layout: Layout, work: Work, rank: int, split: list[range]) -> Memory:
    stages = layout.stages_of(rank)
    layers = [layer for stage in stages for layer in split[stage]]
    first, last = 0 in stages, layout.stages - 1 in stages
    held = weights(config, layers, first=first, last=last)
    whole = sum(_whole(weight, layout) for weight in held)
    sharded = sum(stored_elements(weight, layout) for weight in held)
    flight = micro_batches_in_flight(layout, work.micro_batches, rank)
    return Memory(
        parameters=4 * sharded,
        gathered=work.bytes_per_element * (whole if layout.pipeline > 1 else _gathered(config, held, layout)),
        gradients=4 * (whole if work.micro_batches > 1 else sharded),
        optimizer=4 * sum(_moments(weight, work.optimizer) * stored_elements(weight, layout) for weight in held),
        activations=_activations(config, layout, work, layers, flight / len(stages)),
        logits=_logits(config, layout, work) if last else 0,
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def _whole(weight: Weight, layout: Layout) -> int:
    """Elements of a weight that a rank computes with: tensor and expert parallelism split it."""
    if is_expert(weight.name):
        return weight.count // layout.expert
    return -(-weight.count // layout.tensor) if len(weight.shape) == 2 and _splits(weight.name) else weight.count


def _splits(name: str) -> bool:
    """Whether tensor parallelism splits a matrix: all but positions, router and shared experts."""
    return not (name.endswith(("position.weight", "router.weight")) or ".ffn.shared." in name)


def stored_elements(weight: Weight, layout: Layout) -> int:
    """Elements of a weight that a rank which holds its layer stores: the largest of the shards."""
    ranks = layout.expert_shard if is_expert(weight.name) else layout.shard * layout.context
    return -(-_whole(weight, layout) // ranks)


def _gathered(config: DecoderConfig, held: tuple[Weight, ...], layout: Layout) -> int:
    """Elements gathered at once without a pipeline: what is outside the blocks, the block that runs, and the next."""
    outside = sum(_whole(weight, layout) for weight in held if not weight.name.startswith("blocks."))
    block = max(
        sum(_whole(Weight(f"blocks.{layer}.{w.name}", w.shape), layout) for w in layer_weights(config, layer))
        for layer in {0, config.layers - 1}
    )
    return outside + min(2, config.layers) * block


def _moments(weight: Weight, optimizer: Optimizer) -> int:
    hidden = weight.name.startswith("blocks.") and len(weight.shape) >= 2 and "router" not in weight.name
    return 1 if optimizer == "muon" and hidden else 2


# --- activations -----------------------------------------------------------------------------------------------------


def micro_batches_in_flight(layout: Layout, micro_batches: int, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at most, in units of all its layers.

    1F1B: one for each stage from here to the end; GPipe and LoopedBFS: all. Interleaved: v stages per rank keep
    1 + (p − 1) / (p v) times as much as 1F1B on the first rank (Narayanan et al. 2021), here by counting warm-up
    passes. Zero bubble in its V form keeps p (Qi et al. 2024), DualPipeV p + 1 (DeepSeek-AI 2024).
    """
    p, v = layout.pipeline, layout.stages_per_rank
    if p == 1:
        return 1
    if layout.schedule in ("GPipe", "LoopedBFS"):
        return micro_batches
    if layout.schedule == "1F1B":
        return min(micro_batches, p - rank)
    if layout.schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return min(float(micro_batches), ((v - 1) * p + 2 * (p - 1 - rank) + 1) / v)
    return min(micro_batches, p + 1 if layout.schedule == "DualPipeV" else p)


def _activations(config: DecoderConfig, layout: Layout, work: Work, layers: list[int], flight_per_stage: float) -> int:
    """Bytes kept for the backward pass. ``flight_per_stage`` × stages of the rank = micro-batches in flight."""
    tokens = work.micro_batch * work.sequence_length // layout.context
    stages = len(layout.stages_of(0))
    kept = sum(layer_activations(config, layer, layout, work.recompute, work.bytes_per_element) for layer in layers)
    at_once = 0.0
    if work.recompute != "none":  # one layer is computed again, all of it
        at_once = max(layer_activations(config, layer, layout, "none", work.bytes_per_element) for layer in layers)
    ends = config.dim / layout.tensor * work.bytes_per_element  # the embedding's result, or what the stage received
    return round(tokens * (flight_per_stage * stages * (kept + ends) + at_once))


def layer_activations(
    config: DecoderConfig, layer: int, layout: Layout, recompute: Recompute, bytes_per_element: int
) -> float:
    """Bytes that one layer keeps per token of the rank's sequence, before tensor parallelism splits it.

    Sequence parallelism leaves 1/t of the stream on each rank; inputs of column-parallel products are kept gathered, as
    DTensor does it, where the paper keeps pieces and gathers them again.
    """
    t, dim = layout.tensor, config.dim
    if recompute == "full":
        return dim / t * bytes_per_element
    wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projected = wide + 2 * narrow
    lse = 4 * config.heads / t  # the softmax's denominators, float32
    if recompute == "selective":  # inputs of the layer, results of products, attention and collectives
        elements = dim / t + (projected + wide) / t + dim / t + (dim if t > 1 else 0)
        return elements * bytes_per_element + lse + _ffn_selective(config, layer, t, bytes_per_element)
    normed = (wide + narrow) / t if config.qk_norm else 0  # inputs of the norms of queries and keys
    elements = dim / t + dim + normed + projected / t + wide / t
    return elements * bytes_per_element + lse + _ffn(config, layer, t, bytes_per_element)


_KEPT_INSIDE: dict[Activation, int] = {"swiglu": 4, "geglu": 4, "reglu": 3, "gelu": 2, "relu": 1}
"""Tensors of the inner width that a feed-forward part keeps: gate, its activation, up and their product; or up and its
activation. A ReLU keeps its result only."""


def _ffn(config: DecoderConfig, layer: int, t: int, size: int) -> float:
    """Norm and feed-forward part: the norm's input and output, and what is inside."""
    inside = _KEPT_INSIDE[config.activation]
    if not config.has_experts(layer):
        return (config.dim / t + config.dim + inside * config.ffn_dim / t) * size
    return (2 * config.dim * size + _moe(config, inside, 2, size)) / t


def _ffn_selective(config: DecoderConfig, layer: int, t: int, size: int) -> float:
    products = 2 if config.gated else 1
    if not config.has_experts(layer):
        return (products * config.ffn_dim / t + config.dim / t + (config.dim if t > 1 else 0)) * size
    return (config.dim * size + _moe(config, products, 1, size)) / t


def _moe(config: DecoderConfig, inside: int, copies: int, size: int) -> float:
    """Bytes per token of the mixture: scores in float32; copies of each token for its experts; inside of them."""
    routed = config.experts_per_token * (copies * config.dim + inside * config.expert_width)
    return 8 * config.experts + (routed + inside * config.shared_expert_dim) * size


def _logits(config: DecoderConfig, layout: Layout, work: Work) -> int:
    """Logits and their gradient as computed, and one float32 copy inside the loss."""
    tokens = work.micro_batch * work.sequence_length // layout.context
    return tokens * -(-config.vocab_size // layout.tensor) * (2 * work.bytes_per_element + 4)
