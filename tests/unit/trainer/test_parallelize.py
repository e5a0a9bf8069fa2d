"""Sharding changes nothing: gradients agree with a single process in float64, where rounding cannot hide a mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from forked import run_ranks
from lockstep_trainer.evaluate import token_loss
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Decoder
from lockstep_trainer.model.init import initial_weight
from lockstep_trainer.optim.norms import local_squares
from lockstep_trainer.parallel.parallelize import accumulate, build_model, initialize, make_mesh

CONFIG = DecoderConfig(
    dim=24,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn_dim=37,  # like the vocabulary no multiple of the ranks: shards are uneven
    vocab_size=131,
    tie_embeddings=True,
    qk_norm=True,
)
BATCH, LENGTH = 8, 11
CPU = torch.device("cpu")


def batch() -> torch.Tensor:
    return torch.randint(0, 131, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def reference(path: Path, config: DecoderConfig) -> None:
    """Gradients of the mean loss over the whole batch, one process, no sharding."""
    torch.set_default_dtype(torch.float64)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, config, 5, CPU))
    tokens = batch()
    loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()
    loss.backward()
    squares = local_squares(model.parameters())
    torch.save((loss.detach(), squares, {name: p.grad for name, p in model.named_parameters()}), path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("ranks", "replicate", "micro"), [(2, 1, 1), (2, 1, 2), (4, 2, 1), (2, 2, 1)])
def test_gradients_match_a_single_process(tmp_path: Path, ranks: int, replicate: int, micro: int, tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    run_ranks(1, lambda rank: reference(tmp_path / "reference", config))

    def compare(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        model = build_model(config, make_mesh(CPU, ranks, replicate), CPU, "fp32")
        initialize(model, 5)
        own = batch().chunk(ranks)[rank]
        total = torch.zeros(())
        pieces = own.chunk(micro)
        for number, piece in enumerate(pieces):
            accumulate(model, last=number == len(pieces) - 1)
            loss = token_loss(model(piece[:, :-1]), piece[:, 1:])
            (loss * ranks / (BATCH * LENGTH)).backward()
            total += loss.detach()
        totals = torch.stack([total, local_squares(model.parameters())])
        dist.all_reduce(totals)
        loss, squares, gradients = torch.load(tmp_path / "reference")
        assert float(totals[0]) / (BATCH * LENGTH) == pytest.approx(float(loss), rel=1e-12)
        assert float(totals[1]) / replicate == pytest.approx(float(squares), rel=1e-12)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-10, atol=1e-14)

    run_ranks(ranks, compare)


def test_fresh_weights_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    def weights(rank: int, ranks: int, replicate: int) -> None:
        model = build_model(CONFIG, make_mesh(CPU, ranks, replicate), CPU, "fp32")
        initialize(model, 7)
        whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(whole, tmp_path / f"{ranks}-{replicate}")

    layouts = [(1, 1), (3, 1), (4, 2)]
    for ranks, replicate in layouts:
        run_ranks(ranks, lambda rank, r=ranks, c=replicate: weights(rank, r, c))  # type: ignore[misc]
    first, *others = [torch.load(tmp_path / f"{ranks}-{replicate}") for ranks, replicate in layouts]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert float(first["embedding.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(first["blocks.0.ffn.down.weight"].std()) == pytest.approx(0.01, rel=0.2)
