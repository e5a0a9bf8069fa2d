"""The order of samples is a contract: it is checked against an implementation that shares nothing with the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checker.order import Order, permuted
from lockstep_api.v1alpha1 import DataSpec
from lockstep_trainer.checkpoint.manifest import SourceState
from lockstep_trainer.data.order import BLOCK, Mixture, Stage, key_of, permute, quotas, splitmix64
from lockstep_trainer.data.sampler import ConstantBatch, Sampler, sampler_state, stages_of
from lockstep_trainer.errors import UserError

SHA = "0" * 64


@dataclass(frozen=True)
class Ramp:
    """Two samples more every third step, up to the sixth level."""

    unit: int

    def samples(self, step: int) -> int:
        return self.unit * (1 + min((step - 1) // 3, 5))

    def samples_before(self, step: int) -> int:
        return sum(self.samples(each) for each in range(1, step))


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the generator with seed 1234567, as in the reference implementation's test vector."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * gamma) % 2**64 for n in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), key=st.integers(0, 2**63))
def test_each_key_makes_a_permutation_and_the_checkers_is_the_same(size: int, key: int) -> None:
    found = permute(np.arange(size), size, np.array([key], np.uint64)).tolist()
    assert sorted(found) == list(range(size))
    assert found[:20] == [permuted(place, size, key) for place in range(min(20, size))]


def test_a_permutation_looks_random() -> None:
    """Neighbours are torn apart, and a place goes everywhere over the keys: chi-squared within 5 sigma."""
    size, keys = 64, 4000
    ends = np.array([permute(np.array([3]), size, key_of(number, 9))[0] for number in range(keys)])
    counts = np.bincount(ends, minlength=size)
    squared = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert abs(squared - (size - 1)) < 5 * np.sqrt(2 * (size - 1))
    order = permute(np.arange(10_000), 10_000, key_of(1))
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_a_billion_samples_need_no_memory() -> None:
    mixture = Mixture(5, (10**9, 3 * 10**9))
    draws = mixture.at(np.arange(7 * 10**9, 7 * 10**9 + 1000))
    assert len(set(zip(draws.source.tolist(), draws.sample.tolist(), strict=True))) == 1000
    assert 200 < (draws.source == 0).sum() < 300
    assert draws.sample[draws.source == 1].max() > 10**9


weights = st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 7.0, 1e-3]), min_size=3, max_size=3).filter(any)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    mixes=st.lists(weights, max_size=3),
    borders=st.lists(st.integers(1, 30), min_size=2, max_size=2, unique=True),
    ranks=st.sampled_from([1, 2, 3, 4]),
    step=st.integers(1, 40),
)
def test_ranks_together_consume_the_order_of_the_contract(
    *, seed: int, sizes: tuple[int, ...], mixes: list[list[float]], borders: list[int], ranks: int, step: int
) -> None:
    """At any data-parallel width, within and across passes, stages and levels of a batch ramp."""
    batches = Ramp(12)
    firsts = [0, *(batches.samples_before(each + 1) for each in sorted(borders))]
    stages = tuple(Stage(first, tuple(mix)) for first, mix in zip(firsts, mixes, strict=False))
    mixture = Mixture(seed, sizes, stages)
    sources = [SourceState(name=f"s{n}", samples=size, data=SHA) for n, size in enumerate(sizes)]
    state = sampler_state(mixture, batches, steps=step, last_change=16, sources=sources, data=SHA)
    order = Order(state.model_dump())
    assert state.drawn == order.indices(step).stop
    found: list[tuple[int, int]] = []
    places: list[int] = []
    for rank in range(ranks):
        draws = Sampler(mixture, batches, rank, ranks).step(step)
        found += zip(draws.source.tolist(), draws.sample.tolist(), strict=True)
        places += draws.index.tolist()
    assert places == list(order.indices(step))
    assert found == order.of_step(step)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(st.integers(1, 700), st.integers(1, 3000)),
    mixes=st.lists(st.sampled_from([(1.0, 1.0), (0.1, 0.9), (0.0, 2.0), (3.0, 1e-4)]), min_size=1, max_size=3),
    border=st.integers(1, 9000),
)
def test_no_sample_is_lost_or_repeated_in_its_sources_pass(
    seed: int, sizes: tuple[int, int], mixes: list[tuple[float, float]], border: int
) -> None:
    """Whatever the mix and its borders, each source gives its passes one after the other, each sample once in each;
    and ``drawn`` counts them."""
    stages = tuple(Stage(number * border, mix) for number, mix in enumerate(mixes))
    mixture = Mixture(seed, sizes, stages)
    draws = mixture.at(np.arange(3 * border))
    for source, size in enumerate(sizes):
        ids = draws.sample[draws.source == source]
        assert mixture.drawn(3 * border)[source] == len(ids)
        for start in range(0, len(ids) - size + 1, size):
            assert sorted(ids[start : start + size]) == list(range(size))
        assert len(set(ids[len(ids) // size * size :])) == len(ids) % size


def test_a_pass_over_sources_without_weights_has_every_sample_once() -> None:
    mixture = Mixture(3, (7, 0, 13))
    passes = [mixture.at(np.arange(start, start + 20)) for start in (0, 20)]
    pairs = [list(zip(each.source.tolist(), each.sample.tolist(), strict=True)) for each in passes]
    assert all(sorted(each) == [(0, n) for n in range(7)] + [(2, n) for n in range(13)] for each in pairs)
    assert pairs[0] != pairs[1]


@settings(max_examples=50, deadline=None)
@given(mix=weights, count=st.integers(0, 10**12))
def test_quotas_are_exact_and_never_fall(mix: list[float], count: int) -> None:
    shares, later = quotas(mix, count), quotas(mix, count + BLOCK)
    assert sum(shares) == count
    assert all(a <= b for a, b in zip(shares, later, strict=True))
    assert all(abs(share - count * weight / sum(mix)) <= 3 + 1e-3 for share, weight in zip(shares, mix, strict=True))


def test_a_width_that_does_not_divide_the_step_is_said() -> None:
    with pytest.raises(UserError, match="step 1 has 10 samples, which is not a multiple of the data-parallel width 4"):
        Sampler(Mixture(0, (5,)), ConstantBatch(10), 0, 4).step(1)


def data(*sources: dict[str, Any], **more: Any) -> DataSpec:
    given = [{"uri": "file:///x", **source} for source in sources]
    return DataSpec.model_validate({"sources": given, **more})


def test_stages_begin_at_their_steps_sample() -> None:
    spec = data({"name": "a", "weight": 2}, {"name": "b", "weight": 1}, stages=[{"fromStep": 5, "weights": {"b": 1.0}}])
    stages = stages_of(spec, {"a": 10, "b": 10}, Ramp(2))
    assert stages == (Stage(0, (2.0, 1.0)), Stage(2 * 3 + 4, (0.0, 1.0)))


def test_stages_without_weights_begin_with_the_sizes() -> None:
    spec = data({"name": "a"}, {"name": "b"}, stages=[{"fromStep": 2, "weights": {"a": 1.0}}])
    assert stages_of(spec, {"a": 10, "b": 30}, ConstantBatch(4)) == (Stage(0, (10.0, 30.0)), Stage(4, (1.0, 0.0)))
    assert stages_of(data({"name": "a"}, {"name": "b"}), {"a": 10, "b": 30}, ConstantBatch(4)) == ()


def test_a_source_with_weight_and_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"sources\[1\]: it has weight 0.5 and not one whole sample"):
        Mixture(0, (10, 0), (Stage(0, (1.0, 0.5)),))
    with pytest.raises(UserError, match="no source has a whole sample"):
        Mixture(0, (0, 0))


def test_what_changed_is_named() -> None:
    sources = [SourceState(name=name, samples=9, data=SHA) for name in ("wiki", "code")]
    mixture, batches = Mixture(1, (9, 9)), ConstantBatch(4)
    state = sampler_state(mixture, batches, steps=0, last_change=1, sources=sources, data=SHA)
    assert state.behind(7).changes(state) == ""
    assert state.behind(7).drawn == 28
    other = state.model_copy(update={"sources": (SourceState(name="wiki", samples=8, data=SHA), sources[1])})
    assert other.changes(state) == "source wiki had 9 samples, and has 8 now"
    other = state.model_copy(update={"sources": (sources[0],), "data": "1" * 64})
    assert other.changes(state) == "source code is gone"
    assert state.model_copy(update={"data": "1" * 64}).changes(state) == "the tokenizer or the packing is another"
    assert state.model_copy(update={"seed": 2}).changes(state) == "the seed was 1, and is 2 now"
