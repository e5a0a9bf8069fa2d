"""The trainer's mathematics on a GPU beside float64 on a CPU: every path that a GPU takes and a CPU does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpu.ranks import alone
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.batch import Batch
from lockstep_trainer.errors import UserError
from lockstep_trainer.loss import Loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.grouped import grouped_linear, has_kernel
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.context import prefix_attention
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.gradients import clip, squares
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.parallel.parallelize import build_parts, initialize

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
DENSE = DecoderConfig(dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=512, vocab_size=1024)
MIXTURE = DecoderConfig(
    dim=256, layers=2, heads=4, kv_heads=2, ffn_dim=256, vocab_size=1024, experts=8, experts_per_token=2
)
BOUNDS = {"fp32": 2e-5, "bf16": 0.05, "float8": 0.2}
"""Of a gradient's relative error. fp32: 2⁻²⁴ over sums of some hundred terms, a few layers deep; bf16: as the parity
table on CPUs; float8: three bits of mantissa, seven times as coarse as bf16."""
MIXTURES_IN_BF16 = 0.3
"""Rounding sends some tokens to other experts, on a single process too (docs/reference/parity.md)."""


def run(folder: Path) -> dict[str, Any]:
    """Errors by case."""
    alone(GPU)
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {"worst_gradient": {}, "kernels": _kernels()}
    for name, config in {"dense": DENSE, "mixture": MIXTURE}.items():
        exact, sums = _exact(config)
        for precision in ("fp32", "bf16", "float8"):
            for backend in (None, "inductor"):
                case = f"{name}, {precision}, {'compiled' if backend else 'eager'}"
                try:
                    error, loss = _error(config, precision, backend, exact, sums)
                except UserError as refusal:
                    found["worst_gradient"][case] = str(refusal)
                    continue
                bound = MIXTURES_IN_BF16 if name == "mixture" and precision != "fp32" else BOUNDS[precision]
                print(f"{case}: worst gradient off by {error:.2g}, loss by {loss:.2g}", flush=True)
                found["worst_gradient"][case] = [error, loss]
                assert error < bound, f"{case}: a gradient is off by {error:.2g}"
    found["optimizers"] = {name: _optimizer(name) for name in ("adamw", "muon")}
    return found


def _batch(config: DecoderConfig) -> Batch:
    tokens = torch.randint(0, config.vocab_size, (4, 257), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def _exact(config: DecoderConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients in float64 on the CPU, and the loss."""
    torch.set_default_dtype(torch.float64)
    model = Decoder(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # drawn in float32, as the trainer does, so that both start from the same bits
            parameter.copy_(initial_weight(name, parameter.shape, config, 5, CPU).float())
    batch = _batch(config)
    loss, sums = Loss()(model(batch.inputs), batch.targets, batch.tokens)
    torch.autograd.backward(loss)
    gradients = {name: cast(Tensor, parameter.grad) for name, parameter in model.named_parameters()}
    return gradients, sums


def _engine(config: DecoderConfig, precision: str, backend: str | None) -> Engine:
    layout = Layout()
    meshes = Meshes.build(layout, GPU)
    parts = build_parts(config, layout, meshes, device=GPU, precision=precision, compile_backend=backend)
    initialize(parts, seed=5)
    with torch.no_grad():  # a GPU draws other numbers
        for name, parameter in parts[0].named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(initial_weight(name, parameter.shape, config, 5, CPU).float().view(local.shape))
    return Engine(parts, layout, meshes, Loss(compiler=backend), micro_batch_size=2, device=GPU)


def _error(
    config: DecoderConfig, precision: str, backend: str | None, exact: dict[str, Tensor], sums: Tensor
) -> tuple[float, float]:
    engine = _engine(config, precision, backend)
    batch = _batch(config)
    ours = engine.forward_backward(batch.to(GPU), batch.tokens)
    worst = 0.0
    for name, parameter in engine.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        right = exact[name]
        worst = max(worst, float((whole.double().cpu() - right).norm() / right.norm()))
    return worst, abs(float(ours[0]) / float(sums[0]) - 1)


def _kernels() -> dict[str, float]:
    """The kernels that are called by name on a GPU, beside float64."""
    random = torch.Generator(GPU).manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, device=GPU) * scale).bfloat16().requires_grad_()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_attention(q, k, v, None)

    counts = torch.tensor([5, 0, 130, 65], device=GPU)

    def grouped(rows: Tensor, weight: Tensor) -> Tensor:
        if rows.is_cuda:
            assert has_kernel(rows, weight)
        return grouped_linear(rows, weight, counts.to(rows.device))

    return {
        "attention to a prefix": _against_float64(
            attention, draw(2, 8, 128, 64), draw(2, 2, 512, 64), draw(2, 2, 512, 64)
        ),
        "attention to a prefix of its own length": _against_float64(
            attention, draw(2, 8, 128, 64), draw(2, 8, 128, 64), draw(2, 8, 128, 64)
        ),
        "grouped product": _against_float64(grouped, draw(200, 256), draw(4, 128, 256, scale=1 / 16)),
    }


def _against_float64(function: Callable[..., Tensor], *inputs: Tensor) -> float:
    """The largest relative error of result and gradients."""
    precise = [x.detach().cpu().double().requires_grad_() for x in inputs]
    result, right = function(*inputs), function(*precise)
    direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(4))
    result.backward(direction.to(GPU, result.dtype))
    right.backward(direction.bfloat16().double())
    pairs = [(result.detach(), right.detach()), *((x.grad, y.grad) for x, y in zip(inputs, precise, strict=True))]
    errors = [float((cast(Tensor, x).cpu().double() - y).norm() / y.norm()) for x, y in pairs]  # type: ignore[union-attr]
    assert max(errors) < 0.02, f"{function.__name__} is off by {errors}"
    return max(errors)


def _optimizer(name: str) -> float:
    """Five steps of an optimizer on both, in float32: a weight's largest difference, relative to how far it went."""
    spec = OptimizerSpec.model_validate({"name": name, "lr": 1e-2})
    results = []
    for device in (CPU, GPU):
        part = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 96, bias=False), nn.LayerNorm(64)])})
        random = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        before = [parameter.detach().clone() for parameter in part.parameters()]
        part.to(device)
        named = list(part.named_parameters())
        optimizer = build_optimizer(named, spec)
        for _ in range(5):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=random).to(device)
            clip(named, float(squares(named, Layout(), set()).sqrt()), 1.0)
            optimizer.step()
        after = [parameter.detach().cpu() for parameter in part.parameters()]
        results.append([new - old for new, old in zip(after, before, strict=True)])
    errors = [float((ours - right).norm() / right.norm()) for right, ours in zip(*results, strict=True)]
    bound = 1e-4 if name == "adamw" else 0.05  # Muon orthogonalizes in bfloat16 on a GPU
    assert max(errors) < bound, f"{name} is off by {max(errors):.2g}"
    return max(errors)
