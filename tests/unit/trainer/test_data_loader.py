"""Batches by step: the same whatever was read before, at any width; errors come where the data is needed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checker.order import Order
from lockstep_api.v1alpha1 import S3Spec, TrainerSpec
from lockstep_trainer.batch import IGNORE, Batch
from lockstep_trainer.data.corpus import Corpus
from lockstep_trainer.data.loader import Loader
from lockstep_trainer.data.order import Draws
from lockstep_trainer.data.prepare import prepare
from lockstep_trainer.data.sampler import ConstantBatch
from lockstep_trainer.errors import StoreError, UserError

LENGTH, PER_STEP = 16, 6


def spec(tmp_path: Path, **data: Any) -> TrainerSpec:
    generator = np.random.default_rng(1)
    for name, documents in (("a", 40), ("b", 80)):
        texts = [f"{name}{n} " * int(generator.integers(1, 9)) for n in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TrainerSpec.model_validate(
        {
            "model": {"preset": "llama-debug"},
            "tokenizer": {"train": {"kind": "bytes"}},
            "data": {
                "sources": [
                    {"name": "a", "uri": f"file://{tmp_path}/a.jsonl", "weight": 3},
                    {"name": "b", "uri": f"file://{tmp_path}/b.jsonl", "weight": 1},
                ],
                "sequenceLength": LENGTH,
                "packing": "bestFit",
                "documentMask": True,
                "holdout": 0.2,
                "stages": [{"fromStep": 9, "weights": {"b": 1.0}}],
                **data,
            },
            "recipe": {"steps": 30, "globalBatchTokens": LENGTH * PER_STEP},
        }
    )


def loader(corpus: Corpus, wanted: TrainerSpec, rank: int = 0, ranks: int = 1) -> Loader:
    return Loader(corpus, wanted.data, ConstantBatch(PER_STEP), seed=5, rank=rank, ranks=ranks)


def tensors(batch: Batch) -> list[list[Any]]:
    fields = (batch.inputs, batch.targets, batch.positions, batch.documents)
    return [field.tolist() for field in fields if field is not None]


def test_a_step_is_the_same_whatever_was_read_before_it(tmp_path: Path) -> None:
    threads = threading.active_count()
    wanted = spec(tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    with loader(corpus, wanted) as straight:
        expected = {step: tensors(straight.batch(step)[0]) for step in range(1, 13)}
    with loader(corpus, wanted) as jumping:
        for step in (4, 5, 2, 12, 9, 10, 10):
            assert tensors(jumping.batch(step)[0]) == expected[step]
    assert len(expected[1]) == 4
    assert threading.active_count() == threads, "the loader leaves no thread behind"


def test_ranks_share_the_steps_batch_and_the_checker_knows_it(tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    with loader(corpus, wanted) as whole:
        state = whole.state().behind(12)
        order = Order(state.model_dump())
        for ranks in (2, 3):
            parts = [loader(corpus, wanted, rank, ranks) for rank in range(ranks)]
            for step in (1, 8, 9, 12):
                found = [part.batch(step) for part in parts]
                batch, draws = whole.batch(step)
                assert torch.equal(torch.cat([each[0].inputs for each in found]), batch.inputs)
                pairs = list(zip(draws.source.tolist(), draws.sample.tolist(), strict=True))
                assert pairs == order.of_step(step)
            for part in parts:
                part.close()
    assert state.drawn == 12 * PER_STEP
    assert {source for source, _ in order.of_step(8)} | {source for source, _ in order.of_step(7)} == {0, 1}
    assert {source for source, _ in order.of_step(9)} == {1}


def test_masks_hold_in_a_mixed_batch(tmp_path: Path) -> None:
    """Each document of a sample is one text: what is a target follows from its own document alone."""
    wanted = spec(tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    with loader(corpus, wanted) as found:
        batch, _ = found.batch(2)
    assert batch.documents is not None
    assert batch.positions is not None
    same = batch.documents[:, 1:] == batch.documents[:, :-1]
    goes_on = batch.positions[:, 1:] == batch.positions[:, :-1] + 1
    assert torch.equal(same, goes_on)
    inner = batch.targets[:, :-1][~same]
    assert (inner == IGNORE).all()
    assert len(inner)


def test_an_error_is_raised_by_the_step_that_needs_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = spec(tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    reads = 0

    def read(self: Loader, step: int) -> tuple[Batch, Draws]:
        nonlocal reads
        reads += 1
        if step == 3:
            raise StoreError("the store is away")
        return original(self, step)

    original = Loader._read
    monkeypatch.setattr(Loader, "_read", read)
    with loader(corpus, wanted) as found:
        found.batch(1)
        found.batch(2)
        with pytest.raises(StoreError, match="the store is away"):
            found.batch(3)
    assert reads == 3


def test_held_out_samples_are_spread_over_the_ranks(tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    assert [source.name for source in corpus.evaluated] == ["a", "b"]
    tokens = []
    for ranks in (1, 2):
        loaders = [loader(corpus, wanted, rank, ranks) for rank in range(ranks)]
        batches = [batch for each in loaders for batch in each.evaluation(corpus.evaluated[1], at_most=5, per_rank=2)]
        tokens.append(sum(int(batch.tokens) for batch in batches))
        for each in loaders:
            each.close()
    assert tokens[0] == tokens[1] > 0


def own(name: str, tmp_path: Path) -> TrainerSpec:
    (tmp_path / "a.txt").write_text("text")
    return TrainerSpec.model_validate(
        {
            "model": {"preset": "llama-debug"},
            "tokenizer": {"train": {"kind": "bytes"}},
            "data": {
                "sources": [{"uri": f"file://{tmp_path}/a.txt"}],
                "sequenceLength": LENGTH,
                "module": f"own_data:{name}",
                "holdout": 0.1,
            },
            "recipe": {"steps": 30, "globalBatchTokens": LENGTH * PER_STEP},
        }
    )


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.usefixtures("importable")
def test_an_own_data_set_is_read_by_one_thread(tmp_path: Path) -> None:
    """It may have one open file, in which it seeks: an evaluation begins while the next step is read."""
    wanted = own("watched", tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    (source,) = corpus.evaluated
    threads = source.holdout.data.threads  # type: ignore[attr-defined]
    threads.clear()  # that of the fingerprint
    with loader(corpus, wanted) as found:
        for step in (1, 2):
            found.batch(step)
            assert list(found.evaluation(source, at_most=4, per_rank=2))
    assert len(threads) == 1


@pytest.mark.usefixtures("importable")
def test_an_own_data_set_is_shuffled_and_held_out(tmp_path: Path) -> None:
    wanted = own("counting", tmp_path)
    corpus = prepare(wanted, S3Spec(), tmp_path / "data")
    assert corpus.sizes() == {"module": 36}
    assert [len(source.holdout) for source in corpus.evaluated] == [4]
    with loader(corpus, wanted) as found:
        batches = [found.batch(step)[0] for step in range(1, 7)]
        (held,) = found.evaluation(corpus.evaluated[0], at_most=9, per_rank=4)
    firsts = [int(row[0]) for batch in batches for row in batch.inputs]
    assert sorted(firsts) == list(range(36))
    assert firsts != sorted(firsts)
    assert torch.equal(batches[0].targets[:, :-1], batches[0].inputs[:, 1:])
    assert held.inputs[:, 0].tolist() == [36, 37, 38, 39]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "returned a int; it must have __len__ and __getitem__"),
        ("short", r"sample 0 of own_data:short has shape \(16,\) .* sequenceLength \+ 1 = 17"),
        ("beyond", "own_data:beyond gave token 305, and the vocabulary has 257"),
        ("missing", r"trainer\.data\.module"),
    ],
)
def test_an_own_data_set_that_breaks_its_contract_is_refused(tmp_path: Path, name: str, says: str) -> None:
    wanted = own(name, tmp_path)
    with pytest.raises(UserError, match=says):
        prepare(wanted, S3Spec(), tmp_path / "data").sources[0].train.windows(np.array([0, 35]))


@pytest.mark.usefixtures("importable")
def test_an_own_data_set_that_holds_out_nothing_can_not_be_evaluated(tmp_path: Path) -> None:
    wanted = own("counting", tmp_path).model_dump(by_alias=True, exclude_none=True)
    wanted["evaluate"] = {"every": 10}
    wanted["data"]["holdout"] = 0.01
    says = r"trainer\.data\.holdout: 0\.01 of the 40 samples of own_data:counting holds out none; .* add samples"
    with pytest.raises(UserError, match=says):
        prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data")
    wanted["data"]["holdout"] = 0.1
    assert len(prepare(TrainerSpec.model_validate(wanted), S3Spec(), tmp_path / "data").evaluated) == 1
