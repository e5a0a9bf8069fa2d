"""Weight decay, the user's own optimizer, and the learning rate of groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.checkpoint.state import training_state
from lockstep_trainer.errors import UserError
from lockstep_trainer.optim.build import build_optimizer, set_learning_rate, start_fresh

NAMES = {
    "embedding.weight": (4, 3),
    "blocks.0.attention.query.weight": (3, 3),
    "blocks.0.attention.query.bias": (3,),
    "blocks.0.ffn_norm.weight": (3,),
    "blocks.0.ffn.experts.up": (2, 3, 3),
    "head.weight": (4, 3),
}


def parameters() -> list[tuple[str, nn.Parameter]]:
    random = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=random))) for name, shape in NAMES.items()]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("patterns", "decayed"),
    [
        (None, {"blocks.0.attention.query.weight", "blocks.0.ffn.experts.up", "head.weight"}),
        ([], {"embedding.weight", "blocks.0.attention.query.weight", "blocks.0.ffn.experts.up", "head.weight"}),
        (["*weight"], {"blocks.0.ffn.experts.up"}),
    ],
)
def test_only_matrices_decay_and_patterns_take_some_out(
    name: str, patterns: list[str] | None, decayed: set[str]
) -> None:
    chosen = {} if patterns is None else {"no_decay": patterns}
    named = parameters()
    optimizer = build_optimizer(named, OptimizerSpec.model_validate({"name": name, "weight_decay": 0.5, **chosen}))
    names = {parameter: name for name, parameter in named}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {name: 0.5 if name in decayed else 0.0 for name in NAMES}


def test_frozen_parameters_are_left_out() -> None:
    named = parameters()
    named[0][1].requires_grad_(False)
    optimizer = build_optimizer(named, OptimizerSpec())
    assert named[0][1] not in {p for group in optimizer.param_groups for p in group["params"]}


EXAMPLE = '''
import torch

def momentum(named_parameters, spec):
    """SGD with momentum whose embedding learns at a tenth of the rate."""
    slow = [p for name, p in named_parameters if "embedding" in name]
    rest = [p for name, p in named_parameters if "embedding" not in name]
    return torch.optim.SGD(
        [{"params": rest}, {"params": slow, "lr_scale": 0.1}],
        lr=spec.lr, momentum=spec.beta1, weight_decay=spec.weight_decay,
    )

def half(named_parameters, spec):
    return torch.optim.SGD([p for name, p in named_parameters if "blocks" in name], lr=spec.lr)

def nothing(named_parameters, spec):
    return None

def no_spec(named_parameters):
    return None
'''


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_optimizer_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def train(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], steps: int) -> None:
    for step in range(steps):
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, float(step + 1))
        set_learning_rate(optimizer, 0.1)
        optimizer.step()


def test_an_own_optimizer_gets_names_rates_and_a_fresh_start(example: str) -> None:
    """After ``start_fresh`` it does what it does without this package: allocating its state left no trace."""
    spec = OptimizerSpec(module=f"{example}:momentum", beta1=0.9, weight_decay=0.01)
    named, other = parameters(), parameters()
    optimizer = build_optimizer(named, spec)
    assert all("momentum_buffer" in optimizer.state[p] for _, p in named)
    start_fresh(optimizer)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in other[1:]]},
        {"params": [other[0][1]], "lr": 0.01},
    ]
    plain = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    train(optimizer, named, 3)
    for step in range(3):
        for _, parameter in other:
            parameter.grad = torch.full_like(parameter, float(step + 1))
        plain.step()
    for (_, p), (_, q) in zip(named, other, strict=True):
        assert torch.equal(p, q)


def test_an_own_optimizer_goes_on_from_a_checkpoint(example: str, tmp_path: Path) -> None:
    spec = OptimizerSpec(module=f"{example}:momentum")
    straight, again = parameters(), parameters()
    optimizer = build_optimizer(straight, spec)
    start_fresh(optimizer)
    train(optimizer, straight, 2)
    dcp.save(training_state(dict(straight), straight, optimizer), checkpoint_id=tmp_path / "step", no_dist=True)
    resumed = build_optimizer(again, spec)
    dcp.load(training_state(dict(again), again, resumed), checkpoint_id=tmp_path / "step", no_dist=True)
    train(optimizer, straight, 2)
    train(resumed, again, 2)
    for (_, p), (_, q) in zip(straight, again, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("half", "leaves out embedding.weight .2 of 6 parameters."),
        ("nothing", "returned a NoneType; return a torch.optim.Optimizer"),
        ("no_spec", "trainer.recipe.optimizer.module: .* does not take these arguments"),
        ("momentums", "did you mean momentum"),
    ],
)
def test_an_own_optimizer_that_can_not_work_is_refused(example: str, function: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_optimizer(parameters(), OptimizerSpec(module=f"{example}:{function}"))
