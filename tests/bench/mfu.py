"""Tokens per second and MFU of one device, beside `transformers` with the same model.

    PYTHONPATH=tests .venv/bin/python tests/bench/mfu.py [--rounds 3] [--steps 20]

On a GPU: the preset llama3-1b (1.2 B parameters, vocabulary 128,256), samples of 4,096 tokens, bfloat16 with float32
master weights, blocks compiled. The peer is LlamaForCausalLM with the same sizes in its fastest settings: SDPA, fused
AdamW, torch.compile, and autocast to bfloat16 over float32 weights; and once more with the weights themselves in
bfloat16, which is less exact, as the optimizer's small updates are rounded away. Without a GPU a small model stands in,
in float32 and uncompiled on both sides, and CPU seconds are compared in place of wall time.

Sides take turns, each in a process of its own; a step is forward, backward, clipping and AdamW. FLOPs are counted by
``lockstep_trainer.model.flops``: 2 per weight and token, three times that with the backward pass, attention by the
pairs that the causal order lets through. The result is added to docs/results/mfu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import results
from lockstep_api.v1alpha1 import ModelSpec, OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.loss import Loss
from lockstep_trainer.model import huggingface
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.flops import model_flops_utilization, peak_flops, training_flops_per_token
from lockstep_trainer.model.presets import model_config
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.gradients import clip, squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize
from lockstep_trainer.runtime import make_deterministic, refusing, set_allocator

RESULTS = results.RESULTS / "mfu.json"
SPEC = OptimizerSpec(lr=1e-4)
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained."""

    config: DecoderConfig
    length: int
    samples: int
    device: str
    compiled: bool

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.samples * self.length


def work_here(samples: int | None = None) -> Work:
    """What suits this machine, or with so many samples."""
    work = _work_here()
    return work if samples is None else replace(work, samples=samples)


def _work_here() -> Work:
    config = model_config(ModelSpec(preset="llama3-1b"), tokens=128_256)
    if torch.cuda.is_available():
        return Work(config, length=4096, samples=2, device="cuda", compiled=True)
    small = replace(config, dim=256, layers=4, heads=8, kv_heads=4, ffn_dim=768, vocab_size=4096)
    return Work(small, length=256, samples=8, device="cpu", compiled=False)


def lockstep(work: Work, *, deterministic: bool) -> Callable[[Tensor], None]:
    """A step of this trainer, on one rank; ``deterministic``: as its worker runs it, the same bits each time."""
    device = torch.device(work.device, 0) if work.device == "cuda" else torch.device("cpu")
    set_allocator(device)
    if deterministic:
        make_deterministic()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{file.name}.store",
            rank=0,
            world_size=1,
            device_id=device if device.type == "cuda" else None,
        )
    layout = Layout()
    meshes = Meshes.build(layout, device)
    parts = build_parts(
        work.config,
        layout,
        meshes,
        device=device,
        precision="bf16" if work.device == "cuda" else "fp32",
        compile_backend="inductor" if work.compiled else None,
    )
    initialize(parts, seed=0)
    loss = Loss(compiler="inductor" if work.compiled else None)
    engine = Engine(parts, layout, meshes, loss, micro_batch_size=work.samples, device=device)
    named = list(engine.named_parameters())
    optimizer = build_optimizer(named, SPEC)

    def step(tokens: Tensor) -> None:
        with refusing(deterministic and device.type == "cuda"):
            engine.forward_backward(Batch(tokens[:, :-1], tokens[:, 1:]), work.tokens)
        clip(named, float(squares(named, layout, engine.second_copies).sqrt()), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers(work: Work, *, rounded: bool) -> Callable[[Tensor], None]:
    """A step of `transformers`; ``rounded``: weights and optimizer in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        described = huggingface.to_json(work.config, dtype="float32", end_id=None)
        (Path(folder) / "config.json").write_text(json.dumps(described))
        config = AutoConfig.from_pretrained(folder)
    dtype = torch.bfloat16 if rounded else torch.float32
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="sdpa", dtype=dtype).to(work.device)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SPEC.lr, betas=(SPEC.beta1, SPEC.beta2), weight_decay=SPEC.weight_decay, fused=True
    )
    run = torch.compile(model) if work.compiled else model
    cast = work.device == "cuda" and not rounded

    def step(tokens: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            loss = run(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES: dict[str, Callable[[Work], Callable[[Tensor], None]]] = {
    "lockstep": lambda work: lockstep(work, deterministic=True),
    "lockstep, not deterministic": lambda work: lockstep(work, deterministic=False),
    "transformers": lambda work: transformers(work, rounded=False),
    "transformers, weights in bfloat16": lambda work: transformers(work, rounded=True),
}


def run_side(name: str, steps: int, samples: int | None) -> dict[str, Any]:
    """Seconds of each step behind the warm-up: wall time on a GPU, CPU time without one."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    work = work_here(samples)
    step = SIDES[name](work)
    random = torch.Generator().manual_seed(0)
    seconds = []
    for number in range(WARM_UP + steps):
        tokens = torch.randint(0, work.config.vocab_size, (work.samples, work.length + 1), generator=random)
        tokens = tokens.to(work.device)
        begun = _clock(work)
        step(tokens)
        if number >= WARM_UP:
            seconds.append(_clock(work) - begun)
    memory = torch.cuda.max_memory_allocated() if work.device == "cuda" else 0
    return {"seconds": seconds, "memory": memory}


def _clock(work: Work) -> float:
    if work.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_own_process(name: str, steps: int, samples: int | None, seconds: float | None = None) -> dict[str, Any]:
    """The same in a process that nothing has run in before. Raises subprocess.SubprocessError where it fails, or takes
    longer than ``seconds``."""
    command = [sys.executable, __file__, "--side", name, "--steps", str(steps)]
    command += ["--samples", str(samples)] if samples is not None else []
    told = subprocess.check_output(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=seconds)
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def compare(
    rounds: int, steps: int, samples: int | None, sides: Sequence[str], limit: float | None = None
) -> dict[str, Any]:
    """All sides in turns; one that fails, or takes longer than ``limit`` seconds, is left out from there on."""
    work = work_here(samples)
    names = [name for name in sides if work.device == "cuda" or name in ("lockstep", "transformers")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0)
    for _ in range(rounds):
        for name in list(names):
            begun = time.monotonic()
            try:
                found = in_own_process(name, steps, samples, limit)
            except subprocess.SubprocessError as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                names.remove(name)
                continue
            seconds[name] += found["seconds"]
            memory[name] = max(memory[name], found["memory"])
            print(
                f"{name}: {statistics.median(found['seconds']):.4f} s a step, {found['memory'] / 2**30:.1f} GiB, "
                f"{time.monotonic() - begun:.0f} s in all",
                file=sys.stderr,
                flush=True,
            )
    seconds = {name: measured for name, measured in seconds.items() if len(measured) > 1}
    device = (
        torch.cuda.get_device_name() if work.device == "cuda" else f"CPU ({platform.machine()}), no GPU: a stand-in"
    )
    peak = peak_flops(device) if work.device == "cuda" else None
    flops = training_flops_per_token(work.config, work.length)
    sides = {}
    for name, measured in seconds.items():
        rate = work.tokens / statistics.median(measured)
        sides[name] = {
            "tokens_per_second": round(rate, 1),
            "quartiles_s": [round(each, 5) for each in statistics.quantiles(measured, n=4)],
            "steps": len(measured),
            "mfu": round(model_flops_utilization(flops, rate, peak), 4) if peak else None,
            "memory_gib": round(memory[name] / 2**30, 2) if memory[name] else None,
        }
    return {
        "device": device,
        "clock": "wall" if work.device == "cuda" else "CPU seconds of one thread",
        "model": asdict(work.config),
        "sequence_length": work.length,
        "samples": work.samples,
        "compiled": work.compiled,
        "precision": "bf16" if work.device == "cuda" else "fp32",
        "flops_per_token": flops,
        "flops_per_token_full_square": training_flops_per_token(work.config, work.length, full_square=True),
        "peak_flops": peak,
        "sides": sides,
        "ratio": _ratio(sides),
    }


def _ratio(sides: dict[str, dict[str, Any]]) -> float | None:
    """Lockstep's tokens per second beside transformers' with the same precision of weights."""
    ours, theirs = (sides.get(name, {}).get("tokens_per_second") for name in ("lockstep", "transformers"))
    return round(ours / theirs, 3) if ours and theirs else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", choices=SIDES, help="run one side in this process")
    parser.add_argument(
        "--samples", type=int, help="of a step; 2 on a GPU, so that the peer's logits fit beside the rest"
    )
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES), help="which ones; all by default")
    parser.add_argument("--limit", type=float, help="seconds that a side may take in a round, its start included")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.steps, arguments.samples)), flush=True)
        os._exit(0)  # destructors of process groups abort now and then
    result = {
        **results.origin(
            "tokens per second of one device, Lockstep and transformers, the same model and batch",
            f"torch {torch.__version__}",
        ),
        **compare(arguments.rounds, arguments.steps, arguments.samples, arguments.sides, arguments.limit),
    }
    results.add(result, arguments.results)


if __name__ == "__main__":
    main()
