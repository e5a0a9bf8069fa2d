"""A model and a loss of the user's own are trained as the built-in ones are: at any width, on the same numbers.

The examples in examples/custom are what is tested; a whole job of them runs in tests/integration/run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from forked import run_ranks
from lockstep_api.v1alpha1 import ModelSpec, OptimizerSpec, RecipeSpec, TrainingJobSpec
from lockstep_trainer.assembly import Assembly, assemble, batch_sizes
from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.config import load_job
from lockstep_trainer.errors import UserError
from lockstep_trainer.modules import PATH_VARIABLE
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.own import OwnLoss, build_own_model, own_loss
from lockstep_trainer.parallel.engine import Engine
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.mesh import Meshes
from lockstep_trainer.ranks import Ranks

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/custom"
VOCABULARY, SAMPLES, LENGTH = 32, 8, 12
CPU = torch.device("cpu")
RECIPE = RecipeSpec(steps=1, seed=3, precision="fp32", loss="ownloss:smoothed")


@pytest.fixture(autouse=True)
def beside_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, f"{EXAMPLES}{os.pathsep}{Path(__file__).parent}")
    monkeypatch.setattr(sys, "path", list(sys.path))


def batch() -> Batch:
    """The global batch; a third of its tokens have no target, unevenly over the samples."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    targets = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    targets[:3, 2:] = IGNORE
    return Batch(inputs, targets)


def share(layout: Layout, rank: int) -> Batch:
    """What a data-parallel rank has of it."""
    size = SAMPLES // layout.data_width
    first = layout.data_rank(rank) * size
    whole = batch()
    return Batch(whole.inputs[first : first + size], whole.targets[first : first + size])


def engine(layout: Layout, module: str = "ownmodel:build", **overrides: Any) -> Engine:
    """The example model with the example loss, in float64."""
    meshes = Meshes.build(layout, CPU)
    spec = ModelSpec(module=module, overrides={"layers": 2, "dim": 16, **overrides})
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = build_own_model(spec, RECIPE, VOCABULARY, layout, meshes, documents=False)
    finally:
        torch.set_default_dtype(default)
    loss = own_loss(RECIPE, None)
    return Engine([model], layout, meshes, loss, micro_batch_size=1, device=CPU)


def reference() -> tuple[nn.Module, Tensor]:
    """The same on one process with nothing of ours: the model with gradients, and the loss."""
    sys.path.append(str(EXAMPLES))
    import ownmodel  # type: ignore[import-not-found]

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    model = ownmodel.build(VOCABULARY, layers=2, dim=16)
    torch.set_default_dtype(torch.float32)
    whole = batch()
    loss = F.cross_entropy(
        model(whole.inputs).flatten(0, 1), whole.targets.flatten(), label_smoothing=0.05, ignore_index=IGNORE
    )
    loss.backward()
    return model, loss


@pytest.mark.parametrize("layout", [Layout(), Layout(shard=2), Layout(replicate=2, shard=2)], ids=["1", "2", "2x2"])
def test_gradients_are_those_of_one_process_without_lockstep(layout: Layout) -> None:
    def body(rank: int) -> None:
        model, expected = reference()
        trained = engine(layout)
        tokens = int(batch().tokens)
        sums = trained.forward_backward(share(layout, rank), tokens)
        dist.all_reduce(sums)
        torch.testing.assert_close(sums[0] / tokens, expected.detach(), rtol=1e-12, atol=0)
        wanted = dict(model.named_parameters())
        found = dict(trained.named_parameters())
        assert found.keys() == wanted.keys()
        for name, parameter in found.items():
            gradient = parameter.grad.full_tensor()  # type: ignore[union-attr]
            torch.testing.assert_close(gradient, wanted[name].grad, rtol=1e-9, atol=1e-15, msg=name)

    run_ranks(layout.world_size, body)


def test_the_example_optimizer_lowers_the_loss() -> None:
    def body(rank: int) -> None:
        layout = Layout(shard=2)
        trained = engine(layout)
        spec = OptimizerSpec(module="ownoptimizer:build", lr=1e-2)
        optimizer = build_optimizer(trained.named_parameters(), spec)
        losses = []
        for _ in range(20):
            sums = trained.forward_backward(share(layout, rank), int(batch().tokens))
            dist.all_reduce(sums)
            losses.append(float(sums[0]))
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.5 * losses[0], losses

    run_ranks(2, body)


def test_logits_of_a_model_of_ones_own_serve_generation() -> None:
    def body(rank: int) -> None:
        model, _ = reference()
        tokens = batch().inputs[:1, :5]
        found = engine(Layout(shard=2)).logits(tokens)
        torch.testing.assert_close(found, model(tokens)[:, -1:].detach(), rtol=1e-9, atol=1e-12)

    run_ranks(2, body)


def test_a_split_vocabulary_is_whole_for_the_loss() -> None:
    """With tensor parallelism each rank has a part of the logits; value and gradient are those of the whole."""

    def body(rank: int) -> None:
        draw = torch.Generator().manual_seed(2)
        logits = torch.randn(2, 5, VOCABULARY, generator=draw, dtype=torch.float64)
        targets = batch().targets[2:4, :5].clone()
        whole = logits.clone().requires_grad_()
        expected, sums = own_loss(RECIPE, None)(whole, targets, 7.0)
        expected.backward()
        half = VOCABULARY // 2
        part = logits[..., rank * half : (rank + 1) * half].clone().requires_grad_()
        loss, split = own_loss(RECIPE, dist.group.WORLD)(part, targets, 7.0)
        loss.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(sums, split)
        assert whole.grad is not None
        assert torch.equal(part.grad, whole.grad[..., rank * half : (rank + 1) * half])  # type: ignore[arg-type]

    run_ranks(2, body)


def test_no_token_with_a_target_is_a_loss_of_zero() -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss, sums = OwnLoss("x", lambda whole, flat: 1 / torch.zeros(()))(logits, torch.full((1, 3), IGNORE))
    loss.backward()
    assert sums.tolist() == [0, 0]
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"), r"a tensor of shape \(3,\)"),
        (lambda logits, targets: 1.5, "returned float"),
    ],
)
def test_a_loss_that_is_no_sum_is_refused(function: Callable[[Tensor, Tensor], Any], says: str) -> None:
    with pytest.raises(UserError, match=f"trainer.recipe.loss: mine.*{says}"):
        OwnLoss("mine", function)(torch.randn(1, 3, 4), torch.tensor([[0, 1, 2]]))


def test_z_loss_with_a_loss_of_ones_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.recipe\.zLoss"):
        own_loss(RecipeSpec(steps=1, loss="ownloss:smoothed", z_loss=1e-4), None)


# What is wrong with a model: each with the words of its refusal.


class _Linear(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VOCABULARY, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]


def narrow(vocab_size: int) -> nn.Module:
    return _Linear(3)


def half(vocab_size: int) -> nn.Module:
    return _Linear(vocab_size, torch.bfloat16)


def random_by_process(vocab_size: int) -> nn.Module:
    model = _Linear(vocab_size)
    nn.init.constant_(model.weight, os.getpid())
    return model


def nothing(vocab_size: int) -> int:
    return vocab_size


@pytest.mark.parametrize(
    ("module", "layout", "change", "says"),
    [
        ("test_own:nothing", Layout(shard=2), {}, "returned a int; return a torch.nn.Module"),
        ("test_own:half", Layout(shard=2), {}, "weight of test_own:half is not float32"),
        ("test_own:random_by_process", Layout(shard=2), {}, "built another model on rank 1 than on rank 0"),
        ("test_own:narrow", Layout(shard=2), {"documents": True}, r"must take \(tokens, positions, documents\)"),
        ("test_own:narrow", Layout(shard=2), {}, r"gave \(1, 12, 3\); it must give logits of \(1, 12, 32\)"),
        ("ownmodel:build", Layout(shard=2), {"overrides": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ("ownmodel:build", Layout(shard=2), {"recipe": {"compile": True}}, "trainer.recipe.compile: it knows"),
        ("ownmodel:build", Layout(shard=2), {"recipe": {"precision": "float8"}}, "trainer.recipe.precision: float8"),
        ("ownmodel:build", Layout(tensor=2), {}, "parallelism.tensor: 2 with trainer.model.module"),
    ],
)
def test_what_can_not_be_trained_is_refused(module: str, layout: Layout, change: dict[str, Any], says: str) -> None:
    def body(rank: int) -> None:
        meshes = Meshes.build(layout, CPU)
        spec = ModelSpec(module=module, overrides=change.get("overrides", {}))

        def attempt() -> None:
            documents = change.get("documents", False)
            recipe = RECIPE.model_copy(update=change.get("recipe", {}))
            model = build_own_model(spec, recipe, VOCABULARY, layout, meshes, documents=documents)
            loss = own_loss(RECIPE, None)
            Engine([model], layout, meshes, loss, micro_batch_size=1, device=CPU).forward_backward(
                share(layout, rank), 64
            )

        with pytest.raises(UserError, match=says):
            attempt()

    run_ranks(2, body)


def assembled(folder: Path, **trainer: Any) -> Assembly:
    """A model of one's own out of a job's specification, as a worker builds it."""
    given = {
        "tokenizer": {"train": {"kind": "bytes"}},
        "data": {"sources": [{"uri": "file://{stdlib}/this.py"}], "sequenceLength": LENGTH},
        "recipe": {"steps": 1, "globalBatchTokens": SAMPLES * LENGTH, "precision": "fp32"},
        **trainer,
    }
    spec = TrainingJobSpec.model_validate(
        {"nodes": 1, "gpusPerNode": 1, "trainer": given, "checkpoint": {"uri": f"file://{folder}/store"}}
    )
    (folder / "job.json").write_text(
        json.dumps({"name": "job", "namespace": "ns", "uid": "uid", "spec": spec.to_wire()})
    )
    job = load_job(folder / "job.json")
    return assemble(
        job,
        Ranks(0, 1, CPU, dist.group.WORLD),
        batch_sizes(job, 1),
        tokens=VOCABULARY,
        timeout=timedelta(seconds=60),
        section=nullcontext,  # type: ignore[arg-type]
    )


def test_an_export_is_refused_when_the_model_is_built(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        with pytest.raises(UserError, match=r"trainer\.export: .* leave export out"):
            assembled(tmp_path, model={"module": "ownmodel:build"}, export={"uri": f"file://{tmp_path}/export"})

    run_ranks(1, body)


class _Placed(nn.Module):
    """Logits that say where a token is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        del tokens
        return (positions + 100 * documents)[..., None] * self.weight


def placed(vocab_size: int) -> nn.Module:
    return _Placed()


def test_text_is_one_document_for_a_model_that_takes_documents(tmp_path: Path) -> None:
    data = {"sources": [{"uri": "file://{stdlib}/this.py"}], "sequenceLength": LENGTH, "documentMask": True}

    def body(rank: int) -> None:
        found = assembled(tmp_path, model={"module": "test_own:placed"}, data=data).engine
        assert found.logits(batch().inputs[:2], last=LENGTH)[..., 0].tolist() == [list(range(LENGTH))] * 2

    run_ranks(1, body)
