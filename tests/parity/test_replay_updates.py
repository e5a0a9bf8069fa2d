"""The optimizer's update, computed by other ranks too: nothing is found where nothing is wrong, and a rank that
computes it wrongly, or makes another one than it had computed, is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corruption.setting import MIXTURE, Setting, batch_of, build, on_ranks
from lockstep_api.v1alpha1 import OptimizerSpec
from lockstep_trainer.injection.bitflips import flip_bit
from lockstep_trainer.optim.build import build_optimizer
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay import updates
from lockstep_trainer.replay.report import Replay
from lockstep_trainer.replay.ring import Disagreement, Ring
from lockstep_trainer.replay.sampling import Sampling

pytestmark = pytest.mark.timeout(900)

STEPS = 4
CULPRIT = 1
ADAMW = OptimizerSpec(lr=3e-3, eps=1e-6, weightDecay=0.1)
MUON = OptimizerSpec(name="muon", lr=3e-3)


def trained(
    setting: Setting,
    spec: OptimizerSpec,
    *,
    computes: Callable[[int], Callable[..., Tensor]] = lambda _: updates.updated,
    strike: Callable[[int, dict[str, torch.nn.Parameter], torch.optim.Optimizer], None] = lambda *_: None,
) -> tuple[list[Disagreement], list[int]]:
    """What is found in some steps that are all compared, and the steps that showed nothing.

    Args:
        setting: What is trained.
        spec: By which optimizer.
        computes: What this rank computes updates by in a step.
        strike: What happens to it in a step's update.
    """
    engine, heard, agreed = build(setting), list[Disagreement](), list[int]()
    ring = Ring(engine, None, sampling=Sampling(3, 1.0), compiled=False, report=heard.append)
    replay = Replay(engine, ring, report=heard.append, agree=agreed.append)
    parameters = list(engine.named_parameters())
    optimizer = build_optimizer(parameters, spec)
    for step in range(1, STEPS + 1):
        replay._updates.compute = computes(step)
        replay.forward_backward(step, batch_of(step, setting, engine.meshes.rank), setting.tokens)
        with replay.update(step, parameters, optimizer):
            optimizer.step()
            strike(step, dict(parameters), optimizer)
        optimizer.zero_grad()
        assert replay.agreed(step) == (step in agreed)
    return heard, agreed


def wrongly(taken: Tensor, group: dict[str, Any], steps: Tensor) -> Tensor:
    """A device whose update is wrong each time."""
    made = updates.updated(taken, group, steps)
    flip_bit(made[0], element=3, bit=12)
    return made


SOUND = {
    "fsdp": (Setting(Layout(shard=3), micro_batches=1), ADAMW),
    "muon": (Setting(Layout(shard=2), micro_batches=1), MUON),
    "hsdp-tensor": (Setting(Layout(replicate=2, tensor=2), micro_batches=1), ADAMW),
    "pipeline": (Setting(Layout(shard=2, pipeline=2), micro_batches=2), ADAMW),
    "experts": (Setting(Layout(shard=4, expert=2), MIXTURE, micro_batches=1), ADAMW),
    "one-unit": (Setting(Layout(tensor=2), micro_batches=1), ADAMW),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("piece", [updates.PIECE, 100])
def test_sound_ranks_agree_in_each_step_whatever_they_hold(
    name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of other sizes than the neighbour's among them, empty ones too, in one piece and in several."""
    setting, spec = SOUND[name]
    monkeypatch.setattr(updates, "PIECE", piece)

    def body(rank: int) -> None:
        assert trained(setting, spec) == ([], [1, 2, 3, 4])

    on_ranks(tmp_path, setting.layout.world_size, body)


def test_with_three_units_a_rank_that_updates_wrongly_is_named_before_the_update_is_made(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        bad = wrongly if rank == CULPRIT else updates.updated
        found, agreed = trained(
            Setting(Layout(shard=3), micro_batches=1),
            ADAMW,
            computes=lambda step: bad if step >= 3 else updates.updated,
        )
        votes = [each for each in found if each.verdicts[0].kind == "permanent"]
        assert [each.step for each in votes] == [3, 4]
        for each in votes:
            (verdict,) = each.verdicts
            assert (verdict.ranks, verdict.point.phase, each.rejected) == ((CULPRIT,), "update", False)
            assert verdict.evidence == (
                "unit 1 was outvoted by two other units in 3 of 3 computations (updates of unit 0, 1, 2), first at "
                "embedding.weight (update, stage 0)"
            )
        # What it then really does is right here, so that it has not repeated itself.
        assert all(each.verdicts[0].ranks == (CULPRIT,) for each in found)
        assert agreed == [1, 2]

    on_ranks(tmp_path, 3, body)


def test_with_two_units_it_is_said_once_that_one_of_two_ranks_is_wrong(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        bad = wrongly if rank == CULPRIT else updates.updated
        (first, *rest), agreed = trained(Setting(Layout(shard=2), micro_batches=1), ADAMW, computes=lambda _: bad)
        (verdict,) = first.verdicts
        assert (verdict.kind, verdict.ranks) == ("undecided", (0, 1))
        assert [each.step for each in rest] == [1], "behind the update, of what it has made"
        assert agreed == [2, 3, 4]

    on_ranks(tmp_path, 2, body)


@pytest.mark.parametrize("shard", [1, 2])
def test_an_update_that_was_made_otherwise_than_computed_names_its_rank_and_the_parameter(
    shard: int, tmp_path: Path
) -> None:
    name = "blocks.1.attention.query.weight"
    setting = Setting(Layout(shard=shard, tensor=2), micro_batches=1)

    def strike(step: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if step == 3 and torch.distributed.get_rank() == CULPRIT:
            flip_bit(optimizer.state[parameters[name]]["exp_avg_sq"], element=5, bit=3)

    def body(rank: int) -> None:
        (found,), agreed = trained(setting, ADAMW, strike=strike)
        (verdict,) = found.verdicts
        assert (found.step, found.rejected, verdict.ranks) == (3, False, (CULPRIT,))
        assert verdict.evidence == f"rank {CULPRIT} computed the update of step 3 twice, and {name} had other bits"
        assert agreed == [1, 2, 4]

    on_ranks(tmp_path, setting.layout.world_size, body)


def test_an_optimizer_that_does_something_else_on_all_ranks_is_no_fault(tmp_path: Path) -> None:
    def strike(step: int, parameters: dict[str, torch.nn.Parameter], _: torch.optim.Optimizer) -> None:
        if step == 2:
            with torch.no_grad():
                parameters["norm.weight"].add_(1.0)

    def body(rank: int) -> None:
        assert trained(Setting(Layout(shard=2), micro_batches=1), ADAMW, strike=strike) == ([], [1, 2, 3, 4])

    on_ranks(tmp_path, 2, body)
