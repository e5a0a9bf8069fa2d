"""The order of samples is a contract: it is checked against an implementation that shares nothing with the sampler."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep_trainer.sampler import Sampler

M = 2**64


def naive_splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M
    return z ^ (z >> 31)


def naive_order(seed: int, epoch: int, samples: int) -> list[int]:
    key = naive_splitmix64(naive_splitmix64(seed) ^ epoch)
    return sorted(range(samples), key=lambda j: naive_splitmix64(key ^ j))


def test_splitmix64_is_the_published_one() -> None:
    """First outputs of the generator with seed 1234567, as in the reference implementation's test vector."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(naive_splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) % M
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    samples=st.integers(1, 50),
    ranks=st.integers(1, 4),
    share=st.integers(1, 8),
    step=st.integers(1, 40),
)
def test_ranks_together_consume_the_order_of_the_contract(
    seed: int, samples: int, ranks: int, share: int, step: int
) -> None:
    per_step = ranks * share
    expected = [
        naive_order(seed, index // samples, samples)[index % samples]
        for index in range((step - 1) * per_step, step * per_step)
    ]
    found = [
        int(sample) for rank in range(ranks) for sample in Sampler(seed, samples, per_step, rank, ranks).step(step)
    ]
    assert found == expected


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_each_pass_sees_every_sample_once(samples: int) -> None:
    sampler = Sampler(3, samples, samples, 0, 1)
    passes = [sampler.step(step).tolist() for step in (1, 2, 3)]
    assert all(sorted(each) == list(range(samples)) for each in passes)
    assert samples < 3 or passes[0] != passes[1]
