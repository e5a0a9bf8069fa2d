"""Does a model learn with Lockstep what it learns with plain transformers and torch?

    python tests/bench/learning.py [--steps 200] [--models llama,qwen3-moe]

Trains small models on real text, the sources of Python's standard library, from the same weights, on the same samples
in the same order, with the same recipe, in float32 on CPU:

    lockstep        this trainer, at layouts of four processes that compose several parallelisms
    transformers    the same model of `transformers` in one process, its own loss, torch.optim.AdamW, torch's clipping
    control         the same, its batch in halves: the same mathematics, rounded in another order

Rounding grows over the steps of any training run; the control shows how much of a difference it makes by itself. Prints
the differences, and writes all losses to docs/results/learning.json and the curves to docs/results/learning.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests")]

import numpy as np  # noqa: E402 - the path comes first
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from bench import results  # noqa: E402
from bench.curves import Curve, draw  # noqa: E402
from forked import run_ranks, start_all, wait_all  # noqa: E402
from lockstep_api.v1alpha1 import OptimizerSpec, ScheduleSpec, TokenizerTraining  # noqa: E402
from lockstep_trainer.batch import Batch  # noqa: E402
from lockstep_trainer.data.order import Mixture  # noqa: E402
from lockstep_trainer.data.sampler import ConstantBatch, Sampler  # noqa: E402
from lockstep_trainer.loss import Loss  # noqa: E402
from lockstep_trainer.model import huggingface  # noqa: E402
from lockstep_trainer.model.config import DecoderConfig  # noqa: E402
from lockstep_trainer.model.init import initial_weight  # noqa: E402
from lockstep_trainer.model.weights import weights  # noqa: E402
from lockstep_trainer.optim.build import build_optimizer, set_learning_rate  # noqa: E402
from lockstep_trainer.optim.schedule import learning_rate  # noqa: E402
from lockstep_trainer.parallel.engine import Engine  # noqa: E402
from lockstep_trainer.parallel.gradients import clip, squares  # noqa: E402
from lockstep_trainer.parallel.layout import Layout  # noqa: E402
from lockstep_trainer.parallel.mesh import Meshes  # noqa: E402
from lockstep_trainer.parallel.parallelize import build_parts, initialize  # noqa: E402
from lockstep_trainer.parallel.pipeline import parts_of  # noqa: E402
from lockstep_trainer.parallel.stages import modelled_costs  # noqa: E402

CPU = torch.device("cpu")

# The recipe, and what both sides are given of it.
SEED, VOCABULARY, TEXT_BYTES = 7, 512, 3_000_000
LENGTH, SAMPLES, EVALUATED = 128, 16, 32  # tokens of a sample; samples of a step; samples held out
WARMUP, PEAK, FINAL, DECAY, CLIP = 20, 3e-3, 0.1, 0.1, 1.0
BETAS, EPS = (0.9, 0.95), 1e-8

LLAMA = DecoderConfig(
    dim=128, layers=2, heads=4, kv_heads=2, ffn_dim=384, vocab_size=VOCABULARY, rope_theta=10_000.0, max_length=LENGTH
)
MODELS = {
    "llama": LLAMA,
    "qwen3-moe": replace(
        LLAMA,
        qk_norm=True,
        head_size=32,
        norm_eps=1e-6,
        experts=8,
        experts_per_token=2,
        expert_dim=96,
        balance_rate=0.0,
    ),
}
LAYOUTS = {
    "llama": {
        "tensor 2 × shard 2": Layout(tensor=2, shard=2),
        "pipeline 2 × context 2": Layout(pipeline=2, context=2, schedule="1F1B"),
    },
    "qwen3-moe": {"tensor 2 × shard 2, expert 4": Layout(tensor=2, shard=2, expert=4)},
}


@dataclass(frozen=True)
class Run:
    """What one side's training gave."""

    losses: list[float]  # of each step, nats per token
    norms: list[float]  # of each step's gradient, before clipping
    held_out: dict[int, float]  # nats per token, by step


# --------------------------------------------------------------------------------------------------------- data


def write_tokens(path: Path) -> None:
    """Tokens of the text, in a process of its own: tokenizing starts threads, and a process with threads must not
    fork."""
    from lockstep_trainer.data.tokenizer import END_OF_TEXT, train_tokenizer

    top, texts, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for file in sorted(top.glob("*.py")):
        text = file.read_text(errors="replace")
        size += len(text)
        if size > TEXT_BYTES:
            break
        texts.append(text)
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=VOCABULARY))
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [each for encoding in tokenizer.encode_batch(texts) for each in (*encoding.ids, end)]
    np.save(path, np.array(ids, np.int64))


@dataclass(frozen=True)
class Data:
    """The samples of all steps."""

    tokens: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> Data:
        """What ``write_tokens`` wrote."""
        return cls(np.load(path, mmap_mode="r"))

    @property
    def samples(self) -> int:
        """Training samples; those behind them are held out."""
        return (len(self.tokens) - 1) // LENGTH - EVALUATED

    def step(self, number: int, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        """Samples of step ``number`` for a data-parallel rank, (samples, LENGTH + 1)."""
        sampler = Sampler(Mixture(SEED, (self.samples,)), ConstantBatch(SAMPLES), rank, ranks)
        return self._take(sampler.step(number).sample)

    def held_out(self, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        """The same of the held-out samples."""
        return self._take(np.array_split(np.arange(self.samples, self.samples + EVALUATED), ranks)[rank])

    def _take(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(self.tokens[ids[:, None] * LENGTH + np.arange(LENGTH + 1)])


def evaluated(step: int, steps: int) -> bool:
    """Whether the held-out loss is taken behind a step."""
    return step % 25 == 0 or step == steps


def _say(rank: int, step: int, run: Run) -> None:
    if rank == 0:
        print(f"    step {step}: loss {run.losses[-1]:.4f}, held out {run.held_out[step]:.4f}", flush=True)


# ----------------------------------------------------------------------------------------------------- lockstep


def train_here(rank: int, *, config: DecoderConfig, layout: Layout, data: Path, steps: int, result: Path) -> None:
    """A rank of Lockstep's side; rank 0 writes the result."""
    found = Data.load(data)
    meshes = Meshes.build(layout, CPU)
    width, own = layout.data_width, layout.data_rank(rank)
    stages = parts_of(layout, meshes.at.pipeline, modelled_costs(config, LENGTH))
    parts = build_parts(config, layout, meshes, device=CPU, stages=stages)
    initialize(parts, SEED)
    loss = Loss(group=meshes.tensor.get_group() if layout.tensor > 1 else None)
    micro_batches = 2 if layout.pipeline > 1 else 1
    engine = Engine(parts, layout, meshes, loss, micro_batch_size=SAMPLES // width // micro_batches, device=CPU)
    named = list(engine.named_parameters())
    spec = OptimizerSpec(lr=PEAK, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
    optimizer = build_optimizer(named, spec)
    schedule = ScheduleSpec(name="cosine", warmup=WARMUP, final_ratio=FINAL)
    run = Run([], [], {})
    for step in range(1, steps + 1):
        tokens = found.step(step, own, width)
        sums = engine.forward_backward(Batch(tokens[:, :-1], tokens[:, 1:]), SAMPLES * LENGTH)
        totals = torch.stack([sums[0], squares(named, layout, engine.second_copies)])
        dist.all_reduce(totals)
        norm = math.sqrt(totals[1].item())
        clip(named, norm, CLIP)
        set_learning_rate(optimizer, learning_rate(step, steps=steps, peak=PEAK, schedule=schedule))
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(totals[0].item() / (SAMPLES * LENGTH))
        run.norms.append(norm)
        if evaluated(step, steps):
            tokens = found.held_out(own, width)
            sums = engine.evaluate(Batch(tokens[:, :-1], tokens[:, 1:]))
            dist.all_reduce(sums)
            run.held_out[step] = sums[0].item() / (EVALUATED * LENGTH)
            _say(rank, step, run)
    if rank == 0:
        result.write_text(json.dumps(asdict(run)))


# ------------------------------------------------------------------------------------------------- transformers


def write_model(config: DecoderConfig, folder: Path) -> None:
    """The first weights as `transformers` reads them."""
    from safetensors.torch import save_file

    shapes = {weight.name: weight.shape for weight in weights(config)}
    tensors = {}
    for each in huggingface.counterparts(config, huggingface.family(config)):
        value = initial_weight(each.name, torch.Size(shapes[each.name]), config, SEED, CPU)
        pieces = value.unbind() if each.stacked else (value,)
        tensors.update({name: piece.contiguous() for name, piece in zip(each.theirs, pieces, strict=True)})
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface.to_json(config, dtype="float32", end_id=None)))


def train_there(_rank: int, *, model: Path, micro_batches: int, data: Path, steps: int, result: Path) -> None:
    """The other side. Nothing of Lockstep but the order of samples."""
    from transformers import AutoModelForCausalLM

    found = Data.load(data)
    decoder, told = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"]:
        raise SystemExit(f"transformers did not find its weights: {told}")
    decoder.train()
    named = list(decoder.named_parameters())
    plain = {name for name, p in named if p.ndim < 2 or "embed_tokens" in name}
    groups = [
        {"params": [p for name, p in named if name not in plain], "weight_decay": DECAY},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)
    run = Run([], [], {})
    for step in range(1, steps + 1):
        loss = 0.0
        for tokens in found.step(step).chunk(micro_batches):
            part = decoder(input_ids=tokens, labels=tokens).loss / micro_batches
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
        half_cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))
        rate = step / WARMUP if step <= WARMUP else FINAL + (1 - FINAL) * half_cosine
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss)
        run.norms.append(norm.item())
        if evaluated(step, steps):
            tokens = found.held_out()
            with torch.no_grad():
                run.held_out[step] = decoder(input_ids=tokens, labels=tokens).loss.item()
            _say(0, step, run)
    result.write_text(json.dumps(asdict(run)))


# --------------------------------------------------------------------------------------------------- comparison


def train(name: str, layouts: dict[str, Layout], steps: int, *, control: bool = True) -> dict[str, Run]:
    """All runs of model ``name``: those at ``layouts``, transformers, and the control."""
    config = MODELS[name]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, model, result = folder / "tokens.npy", folder / "model", folder / "result.json"
        if wait_all(start_all([partial(write_tokens, data)])) != [0]:
            raise SystemExit("the text could not be tokenized")
        write_model(config, model)
        common: dict[str, Any] = {"data": data, "steps": steps, "result": result}
        for title, layout in layouts.items():
            layout.check(config, sequence_length=LENGTH, micro_batches=2)
            run_ranks(layout.world_size, partial(train_here, config=config, layout=layout, **common), timeout=300)
            found[title] = _read(result)
        for title, micro_batches in (("transformers", 1), ("control", 2))[: 2 if control else 1]:
            run_ranks(1, partial(train_there, model=model, micro_batches=micro_batches, **common))
            found[title] = _read(result)
    return found


def _read(path: Path) -> Run:
    run = Run(**json.loads(path.read_text()))
    return replace(run, held_out={int(step): loss for step, loss in run.held_out.items()})


@dataclass(frozen=True)
class Difference:
    """How far a run is from transformers', nats per token."""

    early: float  # largest of the first 20 steps: no rounding has grown yet
    largest: float  # of all steps
    held_out: float  # largest of the held-out losses
    at_the_end: float  # of the last held-out loss, with its sign


def difference(run: Run, peer: Run) -> Difference:
    """Between two runs of as many steps."""
    apart = [abs(a - b) for a, b in zip(run.losses, peer.losses, strict=True)]
    held_out = {step: loss - peer.held_out[step] for step, loss in run.held_out.items()}
    return Difference(
        max(apart[:20]), max(apart), max(abs(each) for each in held_out.values()), held_out[max(held_out)]
    )


def _rounded(run: Run) -> dict[str, Any]:
    return {
        "losses": [round(each, 7) for each in run.losses],
        "norms": [round(each, 5) for each in run.norms],
        "held_out": {step: round(loss, 7) for step, loss in run.held_out.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        **results.origin(
            "training losses of Lockstep and of transformers with torch.optim.AdamW, nats per token",
            f"torch {torch.__version__}, float32, CPU",
        ),
        "recipe": {"steps": arguments.steps, "samples": SAMPLES, "length": LENGTH, "peak": PEAK, "warmup": WARMUP},
        "models": {},
    }
    panels = {}
    for name in arguments.models.split(","):
        runs = train(name, LAYOUTS[name], arguments.steps)
        peer = runs["transformers"]
        differences = {title: difference(run, peer) for title, run in runs.items() if run is not peer}
        print(f"{name}: held-out loss {peer.held_out[arguments.steps]:.4f} with transformers", flush=True)
        for title, apart in differences.items():
            print(f"  {title:30} {' '.join(f'{key} {value:.1e}' for key, value in asdict(apart).items())}", flush=True)
        result["models"][name] = {
            "config": asdict(MODELS[name]),
            "differences": {title: asdict(apart) for title, apart in differences.items()},
            "runs": {title: _rounded(run) for title, run in runs.items()},
        }
        panels[name] = [Curve(title, run.losses, run.held_out) for title, run in runs.items()]
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / "learning.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.results / "learning.svg").write_text(draw(panels, reference="transformers"))


if __name__ == "__main__":
    main()
