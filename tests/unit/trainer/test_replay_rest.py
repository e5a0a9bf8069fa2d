"""A bit that flips in memory between two updates: seen on the next compared step, and its rank named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import rendezvous_store, worker_folders
from lockstep_trainer.injection.bitflips import flip_bit
from lockstep_trainer.injection.faultorders import ORDER, Order
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.replay.changed import judge_changed, on_purpose
from lockstep_trainer.replay.rest import Resting
from lockstep_trainer.replay.units import Units
from staged import run_kept, small_job

STEPS = 6
STRUCK = 4
"""It strikes between the updates of the steps 3 and 4."""


def trained() -> tuple[list[tuple[str, torch.nn.Parameter]], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.named_parameters()), optimizer


def first_moment(parameters: list[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    moment: torch.Tensor = optimizer.state[parameters[0][1]]["exp_avg"]
    return moment


def changed(resting: Resting) -> tuple[str, ...]:
    names, differ = resting.compared()
    return tuple(name for name, other in zip(names, differ.tolist(), strict=True) if other)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (lambda parameters, _: parameters[1][1], ("bias",)),
        (first_moment, ("weight, exp_avg",)),
        (lambda parameters, optimizer: optimizer.state[parameters[1][1]]["exp_avg_sq"], ("bias, exp_avg_sq",)),
    ],
)
@pytest.mark.parametrize("bit", [0, 31])
def test_what_a_flipped_bit_changed(where: Callable[..., torch.Tensor], names: tuple[str, ...], bit: int) -> None:
    parameters, optimizer = trained()
    resting = Resting(parameters, optimizer)
    assert changed(resting) == ()
    with torch.no_grad():
        flip_bit(where(parameters, optimizer), element=2, bit=bit)
    assert changed(resting) == names


def test_what_all_do_is_no_hardware() -> None:
    assert on_purpose([("a",), ("a",), ("a",), ()])
    assert on_purpose([("a",)]), "of one rank nobody can tell"
    assert not on_purpose([("a",), ()])
    assert not on_purpose([(), ()])


def test_each_rank_that_changed_is_named_with_what_and_where() -> None:
    units = Units(Layout(pipeline=2, shard=2))
    verdicts = judge_changed(
        units, [(), (), ("blocks.1.ffn.up.weight", "head.weight"), ()], phase="forward", confidence=1.0,
        evidence=lambda rank, what: f"on rank {rank}: {what}",
    )  # fmt: skip
    (verdict,) = verdicts
    assert (verdict.ranks, verdict.unit, verdict.confidence) == ((2,), 0, 1.0)
    assert verdict.evidence == "on rank 2: blocks.1.ffn.up.weight and 1 more"
    assert str(verdict.point) == f"blocks.1.ffn.up.weight (forward, stage {units.layout.stages_of(1)[0]})"


def an_order() -> Order:
    """It strikes once, before step STRUCK: what it draws is its name's."""
    for number in range(1000):
        order = Order(f"order-{number}", "flip", site="optimizer", layer=1, bit=20, rate=0.2)
        drawn = random.Random(f"{order.id}/1/1")
        if [drawn.random() < order.rate for _ in range(STEPS)] == [step == STRUCK for step in range(1, STEPS + 1)]:
            return order
    raise AssertionError("none of a thousand")


@pytest.mark.parametrize("sample", [1.0, 0.0])
def test_a_moment_that_flips_on_one_rank_of_a_run(tmp_path: Path, sample: float) -> None:
    """The states behind steps 3 and 4 may hold it: nothing beyond step 2 may be started from."""
    root = tmp_path / "run"
    with rendezvous_store() as port:
        job = small_job(root, STEPS, {"corruption": {"action": "Report", "sample": sample}})
        meeting = {"host": "127.0.0.1", "port": port, "prefix": "run"}
        folders = worker_folders(root, job, ranks=2, port=port, rendezvous=meeting)
        for rank, folder in enumerate(folders):
            faults = root / "faults" / str(rank)
            faults.mkdir(parents=True)
            start = json.loads((folder / "start.json").read_text())
            (folder / "start.json").write_text(json.dumps({**start, "faults": str(faults)}))
        (faults / ORDER).write_text(json.dumps(an_order().document()))
        assert run_kept(folders) == [0, 0], (folders[0] / "output.log").read_text()
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folders[0] / "events.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "corruption"]
    agreed = [line["step"] for line in lines if line["kind"] == "replayed"]
    if sample == 0:
        assert (found, agreed) == ([], [1])
        return
    (line,) = found
    assert (line["step"], line["rejected"]) == (STRUCK - 1, False)
    (verdict,) = line["verdicts"]
    assert (verdict["ranks"], verdict["confidence"]) == ([1], 1.0)
    assert verdict["evidence"] == (
        f"the memory of rank 1 did not keep what the update of step {STRUCK - 1} left there: "
        "blocks.1.attention.query.weight, exp_avg had other bits before the next one"
    )
    assert agreed == [step for step in range(1, STEPS + 1) if step != STRUCK]
