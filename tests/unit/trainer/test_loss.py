"""Cross entropy and z-loss: against torch's own, whole and split along the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from forked import run_ranks
from lockstep_trainer import loss as loss_module
from lockstep_trainer.batch import IGNORE
from lockstep_trainer.loss import Loss

VOCABULARY, TOKENS = 24, 12


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (3, 4, V), some of them large, and targets of which three are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, VOCABULARY, generator=generator, dtype=torch.float64) * 5
    logits[0, 0] += 200  # exp of it would overflow float32
    targets = torch.randint(0, VOCABULARY, (3, 4), generator=generator)
    targets[0, 1] = targets[2] = IGNORE
    return logits.to(dtype).requires_grad_(), targets


def plain(logits: Tensor, targets: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """The two sums by torch's own functions."""
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
    z_loss = z_weight * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    return cross_entropy, z_loss


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 2**25])
def test_loss_and_gradient_are_torchs_in_whatever_pieces(
    monkeypatch: pytest.MonkeyPatch, z_weight: float, chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK", chunk)
    logits, targets = example()
    expected = plain(logits, targets, z_weight)
    (gradient,) = torch.autograd.grad(sum(expected, torch.zeros(())) / 7, logits)
    loss, sums = Loss(z_weight)(logits, targets, 7)
    torch.autograd.backward(loss)
    torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(loss, sum(expected, torch.zeros(())) / 7, rtol=1e-13, atol=0)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-15)
    assert not sums.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_it_is_the_same(dtype: torch.dtype) -> None:
    """Through torch.compile's own transformations, without the compiler's kernels, which take a minute here."""
    gradients, losses = [], []
    for compiler in (None, "aot_eager"):
        logits, targets = example(dtype)
        loss, sums = Loss(0.1, compiler=compiler)(logits, targets, 7)
        torch.autograd.backward(loss)
        gradients.append(logits.grad)
        losses.append(sums)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_batch_without_targets_has_loss_and_gradient_zero() -> None:
    logits, targets = example()
    loss, sums = Loss(0.1)(logits, torch.full_like(targets, IGNORE), torch.tensor(5))
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert loss == 0
    assert sums.tolist() == [0, 0]
    assert not logits.grad.any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = example(torch.bfloat16)
    precise = logits.detach().double().requires_grad_()
    expected = plain(precise, targets, 0.1)
    torch.autograd.backward(sum(expected, torch.zeros(())))
    loss, sums = Loss(0.1)(logits, targets)
    torch.autograd.backward(loss)
    assert (loss.dtype, sums.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-5, atol=0)
    assert logits.grad is not None
    assert precise.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), precise.grad, rtol=2**-8, atol=1e-4)  # one rounding to bfloat16


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_split_vocabulary_gives_the_same_on_every_rank(ranks: int) -> None:
    def compare(rank: int) -> None:
        logits, targets = example()
        expected = plain(logits, targets, 0.1)
        (gradient,) = torch.autograd.grad(sum(expected, torch.zeros(())) / 7, logits)
        own = logits.detach().chunk(ranks, dim=-1)[rank].clone().requires_grad_()
        loss, sums = Loss(0.1, dist.group.WORLD)(own, targets, 7)
        torch.autograd.backward(loss)
        torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(own.grad, gradient.chunk(ranks, dim=-1)[rank], rtol=1e-12, atol=1e-15)
        everyone = [torch.empty_like(sums) for _ in range(ranks)]
        dist.all_gather(everyone, sums)
        assert all(torch.equal(sums, other) for other in everyone)

    run_ranks(ranks, compare)
