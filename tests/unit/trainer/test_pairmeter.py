"""Links are measured by pairs that never wait for somebody who does not come."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from forked import run_ranks
from lockstep_trainer.measuring.pairmeter import EVERY, PairMeter, partners
from lockstep_trainer.stragglers.settings import LINK_ROUNDS


@pytest.mark.parametrize("ranks", [3, 4, 5, 8, 9, 64, 1000])
def test_both_of_a_pair_know_it_and_few_ranks_have_no_partner(ranks: int) -> None:
    met: dict[int, set[int]] = {rank: set() for rank in range(ranks)}
    for turn in range(LINK_ROUNDS):
        chosen = partners(ranks, turn)
        assert all(chosen[other] == rank != other for rank, other in chosen.items())
        assert len(chosen) == ranks - ranks % 2
        for rank, other in chosen.items():
            met[rank].add(other)
    assert all(len(others) >= 2 for others in met.values()), "a slow link shows with two partners"


def test_connections_stay_few_however_long_a_job_trains() -> None:
    met = {partners(64, turn)[0] for turn in range(100)}
    assert len(met) == LINK_ROUNDS


def test_a_rank_without_a_partner_goes_on_and_the_others_tell_theirs_once() -> None:
    def body(rank: int) -> None:
        meter = PairMeter(rank, 3, torch.device("cpu"))
        for turn in range(3 * LINK_ROUNDS):
            meter.measure(turn * EVERY)
            told, again = meter.take(), meter.take()
            partner = partners(3, turn).get(rank)
            assert again is None
            if partner is None:
                assert told is None
                continue
            assert told is not None
            assert told[0] == partner
            assert told[1] > 0
        flag = torch.ones(1)
        dist.all_reduce(flag)  # nothing of the exchanges is left over in the group
        assert flag.item() == 3

    run_ranks(3, body, timeout=120)
