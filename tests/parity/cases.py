"""The cells of the matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle
from typing import Any, Literal

from lockstep_api.v1alpha1.parallelism import V_SCHEDULES
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.parallel.layout import SPLIT_BACKWARD, Layout
from lockstep_trainer.parallel.recompute import Recompute

Precision = Literal["fp64", "fp32", "bf16"]
SAMPLES, LENGTH, STEPS = 16, 24, 5
"""Of a global batch; tokens of a sample; optimizer steps."""

# Sizes are no powers of two where that is possible, so that shards are uneven.
LLAMA = DecoderConfig(dim=24, layers=4, heads=4, kv_heads=2, ffn_dim=36, vocab_size=132, norm_eps=1e-5)
QWEN = replace(LLAMA, kv_heads=4, head_size=8, qk_norm=True, tie_embeddings=True)
MOE = replace(LLAMA, experts=8, expert_dim=12, dense_layers=1, balance_rate=0.05)
MODELS = {
    "llama": LLAMA,
    "qwen": QWEN,
    "gpt": replace(
        LLAMA,
        norm="layer",
        attention_bias=True,
        activation="gelu",
        positions="learned",
        max_length=LENGTH,
        tie_embeddings=True,
    ),
    "alibi": replace(LLAMA, positions="alibi", activation="geglu"),
    "sinusoidal": replace(LLAMA, positions="sinusoidal", kv_heads=4, activation="relu"),
    "window": replace(QWEN, window=7, tie_embeddings=False),
    "moe": MOE,
    # Three experts on each of two ranks do not divide among them: FSDP cuts another dimension.
    "moe-shared": replace(
        MOE, experts=6, kv_heads=4, shared_expert_dim=20, routing="sigmoid", qk_norm=True, tie_embeddings=True
    ),
}
ALL_SCHEDULES = (
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
_LOW: tuple[Precision, ...] = ("fp32", "bf16")
_RECOMPUTE: tuple[Recompute, ...] = ("selective", "full")
_FOR_MIXTURES = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
_TWO_STAGES = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SCHEDULES)


@dataclass(frozen=True, slots=True)
class Case:
    """One cell: a model at a layout, and how it is run."""

    model: str
    layout: Layout
    documents: bool = False
    precision: Precision = "fp64"
    backend: str | None = None  # of torch.compile
    recompute: Recompute = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def name(self) -> str:
        """Model, degrees above 1 by the axis's first letter, then what is not the default."""
        layout = self.layout
        degrees = [
            f"{letter}{degree}"
            for letter, degree in (
                ("r", layout.replicate),
                ("s", layout.shard),
                ("t", layout.tensor),
                ("p", layout.pipeline),
                ("c", layout.context),
                ("e", layout.expert),
            )
            if degree > 1
        ]
        options = [
            layout.schedule if layout.pipeline > 1 else "",
            "ulysses" if layout.context > 1 and layout.context_method == "ulysses" else "",
            "documents" if self.documents else "",
            self.precision if self.precision != "fp64" else "",
            self.backend or "",
            self.recompute if self.recompute != "none" else "",
            self.optimizer if self.optimizer != "adamw" else "",
        ]
        return "-".join([self.model, *(degrees or ["one"]), *filter(None, options)])

    @property
    def config(self) -> DecoderConfig:
        """The model."""
        return MODELS[self.model]

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        samples = SAMPLES // self.layout.data_width
        wanted = 4 if self.layout.pipeline > 1 else 2
        return wanted if samples % wanted == 0 else samples


def layout(schedule: str = "1F1B", *, ulysses: bool = False, **degrees: int) -> Layout:
    """A layout with these degrees."""
    stages = 2 if schedule in _TWO_STAGES and degrees.get("pipeline", 1) > 1 else 1
    method: Literal["ulysses", "allGather"] = "ulysses" if ulysses else "allGather"
    return Layout(**degrees, schedule=schedule, stages_per_rank=stages, context_method=method)


def full() -> list[Case]:
    """The whole matrix, without repetitions."""
    cases = [*_dense(), *_mixtures(), *_options(), *_contexts(), *covering()]
    return list({case.name: case for case in cases}.values())


def covering() -> list[Case]:
    """What CI runs: every parallelism alone, every pair, triples and all at once, each schedule and each option in one
    of them at least."""
    return list({case.name: case for case in _covering()}.values())


def _twos(axes: Sequence[str], degree: int = 2) -> dict[str, Any]:
    return dict.fromkeys(axes, degree)


_AXES = ("replicate", "shard", "tensor", "pipeline", "context")


def _dense() -> Iterator[Case]:
    """Each axis alone and each pair with every schedule and both ways of context; each three and four with some of the
    schedules, so that each schedule is in several of them."""
    for number in (1, 2):
        for axes in combinations(_AXES, number):
            for schedule in ALL_SCHEDULES if "pipeline" in axes else ("1F1B",):
                for ulysses in (False, True) if "context" in axes else (False,):
                    degrees = _twos(axes)
                    # Tied, with normed queries and keys as many as queries, so that Ulysses can split them.
                    yield Case("qwen", layout(schedule, ulysses=ulysses, **degrees))
                    yield Case("qwen", layout(schedule, ulysses=ulysses, **degrees), documents=True)
                    yield Case("llama", layout(schedule, **degrees))
    schedules = cycle(ALL_SCHEDULES)
    for axes in combinations(_AXES, 3):
        for _ in range(3 if "pipeline" in axes else 1):
            schedule = next(schedules) if "pipeline" in axes else "1F1B"
            for ulysses in (False, True) if "context" in axes else (False,):
                yield Case("qwen", layout(schedule, ulysses=ulysses, **_twos(axes)), documents=ulysses)
    for axes in combinations(_AXES, 4):
        schedule = next(schedules) if "pipeline" in axes else "1F1B"
        yield Case("qwen", layout(schedule, **_twos(axes)))
        if "context" in axes:
            yield Case("qwen", layout(schedule, ulysses=True, **_twos(axes)), documents=True)
    for axis in _AXES:
        if axis != "pipeline":
            yield Case("qwen", layout(**_twos((axis,), 4)))
    yield from (Case("qwen", layout(schedule, pipeline=4)) for schedule in ("GPipe", "1F1B"))


def _mixtures() -> Iterator[Case]:
    """The same with experts, by every degree that folds over the axes there are."""
    of_three = cycle(_FOR_MIXTURES)
    for number in (1, 2, 3, 4):
        for axes in combinations(_AXES, number):
            inner = 2 ** len(set(axes) & {"shard", "context", "tensor"})
            degrees = [expert for expert in (1, 2, 4, 8) if expert <= inner]
            if "pipeline" not in axes:
                schedules: Sequence[str] = ("1F1B",)
            else:
                schedules = _FOR_MIXTURES if number < 3 else (next(of_three),)
            for schedule in schedules:
                for expert in degrees if number < 3 else degrees[-2:] if number == 3 else degrees[-1:]:
                    yield Case("moe", layout(schedule, expert=expert, **_twos(axes)))
                if number < 4:
                    yield Case("moe-shared", layout(schedule, expert=min(inner, 2), **_twos(axes)))


def _options() -> Iterator[Case]:
    """What is not a matter of axes: each at a few layouts."""
    few = [
        layout(shard=2, tensor=2),
        layout(replicate=2, context=2),
        layout("ZBVZeroBubble", shard=2, pipeline=2),
        layout("1F1B", tensor=2, pipeline=2),
        layout("Interleaved1F1B", shard=2, tensor=2, pipeline=2),
    ]
    for at in few:
        yield from (Case(model, at) for model in ("gpt", "alibi", "sinusoidal", "window"))
        yield Case("window", at, documents=True)
        for precision in _LOW:
            yield Case("llama", at, precision=precision)
            yield Case(
                "moe", replace(at, expert=2 if at.shard * at.context * at.tensor > 1 else 1), precision=precision
            )
        yield Case("qwen", at, optimizer="muon")
        if at.schedule == "1F1B":
            yield from (Case("qwen", at, recompute=mode) for mode in _RECOMPUTE)
            yield Case("qwen", at, backend="aot_eager")
            yield Case("qwen", at, backend="inductor", precision="fp32")
            yield Case("qwen", at, backend="aot_eager", recompute="full")
            experts = replace(at, expert=2 if at.shard * at.context * at.tensor > 1 else 1)
            yield from (Case("moe", experts, recompute=mode) for mode in _RECOMPUTE)
            if at.shard > 1:  # ten times the work of the others
                yield Case("moe", experts, backend="aot_eager")
    yield from (Case("llama", layout(schedule, pipeline=2), backend="aot_eager") for schedule in SPLIT_BACKWARD)


def _contexts() -> Iterator[Case]:
    """What meets in attention when the sequence is cut: masks, biases and head counts, compiled or recomputed."""
    for ulysses in (False, True):
        two = layout(context=2, ulysses=ulysses)
        for documents in (False, True):
            yield from (Case(model, two, documents=documents) for model in ("llama", "gpt", "alibi", "window"))
            yield Case("sinusoidal", layout(tensor=2, context=2, ulysses=ulysses), documents=documents)
            yield Case("qwen", two, documents=documents, backend="aot_eager")
            yield from (Case("qwen", two, documents=documents, recompute=mode) for mode in _RECOMPUTE)
            yield from (Case("llama", two, documents=documents, precision=precision) for precision in _LOW)
        yield Case("qwen", layout(context=4, ulysses=ulysses), documents=True)
        yield Case("qwen", two, optimizer="muon")


def _covering() -> Iterator[Case]:
    yield Case("qwen", layout(shard=2))
    yield Case("llama", layout(replicate=2))
    yield Case("qwen", layout(tensor=2))
    yield from (Case("qwen", layout(schedule, pipeline=2)) for schedule in ALL_SCHEDULES)
    yield Case("qwen", layout(context=2), documents=True)
    yield Case("qwen", layout(context=2, ulysses=True))
    yield Case("moe", layout(shard=2, expert=2))
    # Pairs.
    yield Case("gpt", layout(shard=2, tensor=2))
    yield Case("qwen", layout(replicate=2, shard=2))
    yield Case("alibi", layout(replicate=2, tensor=2))
    yield from (Case("qwen", layout(schedule, shard=2, pipeline=2)) for schedule in ("1F1B", "InterleavedZeroBubble"))
    yield from (Case("llama", layout(schedule, shard=2, pipeline=2)) for schedule in V_SCHEDULES)
    yield Case("llama", layout("GPipe", replicate=2, pipeline=2))
    yield Case("llama", layout("LoopedBFS", tensor=2, pipeline=2))
    yield Case("window", layout(shard=2, context=2), documents=True)
    yield Case("qwen", layout(tensor=2, context=2, ulysses=True))
    yield Case("qwen", layout("Interleaved1F1B", pipeline=2, context=2), documents=True)
    yield Case("moe-shared", layout(shard=2, tensor=2, expert=2))
    yield Case("moe", layout("ZBVZeroBubble", shard=2, pipeline=2, expert=2))
    # Three and four axes.
    yield Case("qwen", layout("ZBVZeroBubble", shard=2, tensor=2, pipeline=2))
    yield Case("moe", layout("1F1B", shard=2, tensor=2, pipeline=2, expert=4))
    yield Case("qwen", layout(shard=2, tensor=2, context=2), documents=True)
    yield Case("moe-shared", layout("InterleavedZeroBubble", shard=2, pipeline=2, context=2, expert=2))
    yield Case("qwen", layout("Interleaved1F1B", replicate=2, shard=2, tensor=2, pipeline=2))
    yield Case("qwen", layout("1F1B", shard=2, tensor=2, pipeline=2, context=2))
    # Options.
    yield Case("qwen", layout(shard=2, tensor=2), backend="aot_eager")
    yield Case("qwen", layout("DualPipeV", pipeline=2), backend="aot_eager")
    yield Case("qwen", layout(shard=2, tensor=2), recompute="full")
    yield Case("llama", layout(shard=2, tensor=2), precision="fp32")
    yield Case("llama", layout(shard=2, tensor=2), precision="bf16")
