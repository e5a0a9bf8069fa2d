"""Orders of faults: what is no order is refused with a sentence, and what is one strikes in its steps and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from lockstep_api.messages import Rendezvous
from lockstep_trainer.config import Orders
from lockstep_trainer.injection import faultwatch
from lockstep_trainer.injection.bitflips import Fault, Injector
from lockstep_trainer.injection.drag import Drag
from lockstep_trainer.injection.faultorders import ORDER, STATUS, Order
from lockstep_trainer.injection.faultwatch import FaultWatch, first_moment
from lockstep_trainer.measuring.clocks import HostClock
from lockstep_trainer.measuring.ownwork import OwnWork
from lockstep_trainer.measuring.workmeter import WorkMeter
from lockstep_trainer.measuring.yardstick import Yardstick
from lockstep_trainer.model.config import DecoderConfig
from lockstep_trainer.model.decoder import Block, Decoder

CPU = torch.device("cpu")
CONFIG = DecoderConfig(dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=24, vocab_size=32, norm_eps=1e-5)


class StandsStill(Exception):
    pass


def stand_still() -> NoReturn:
    raise StandsStill


class Rank:
    """The worker's end, and the files of its agent."""

    def __init__(self, folder: Path, *, generation: int = 1, measured: bool = True) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.injector = Injector([Decoder(CONFIG)], 3)
        own = OwnWork(HostClock())
        own.blocks = 2
        self.work = WorkMeter(own if measured else None, CPU)
        self.moment = torch.zeros(4)
        meeting = Rendezvous("127.0.0.1", 1, f"1/{generation}")
        orders = Orders("", "uid", 1, generation, 3, 1, 1, 4, 2, meeting, None, "", faults=str(folder))
        self.watch = FaultWatch(
            folder, orders, injector=self.injector, work=self.work,
            moments=lambda layer: self.moment if layer == 1 else None, stand_still=stand_still,
        )  # fmt: skip

    def order(self, **fields: Any) -> Order:
        order = Order.parse(fields)
        (self.folder / ORDER).write_text(json.dumps(order.document()))
        return order

    @property
    def status(self) -> tuple[str, str]:
        raw = json.loads((self.folder / STATUS).read_text())
        return raw["state"], raw["message"]

    def armed(self, steps: range) -> list[int]:
        """The steps in which a bit may flip."""
        found = []
        for step in steps:
            self.watch.step(step - 1)
            found += [step] if self.injector.armed else []
        return found


def test_a_flip_strikes_in_so_many_steps_whichever_worker_computes_them(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    assert rank.armed(range(1, 4)) == []
    order = rank.order(kind="flip", site="product", layer=1, bit=7, rate=0.5, steps=5)
    assert rank.armed(range(4, 6)) == [4, 5]
    (fault,) = rank.injector.armed
    assert (fault.rank, fault.site, fault.layer, fault.bit, fault.rate) == (3, "product", 1, 7, 0.5)
    assert rank.status == ("striking", "in step 5")
    again = Rank(tmp_path, generation=2)
    assert again.armed(range(3, 10)) == [3, 4, 5], "steps that are done again count again"
    assert again.injector.armed == ()
    assert again.status == ("done", "it struck in so many steps, the last was step 5")
    assert Order(**json.loads((tmp_path / ORDER).read_text())) == order
    assert Rank(tmp_path, generation=3).armed(range(4, 7)) == [], "it is over"


def test_what_is_withdrawn_ends_and_faults_of_the_environment_stay(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    own = Fault(3, "product")
    rank.injector.arm([own])
    rank.watch._base = rank.injector.armed
    rank.order(kind="flip", site="weight")
    rank.watch.step(4)
    assert [fault.site for fault in rank.injector.armed] == ["product", "weight"]
    (tmp_path / ORDER).unlink()
    rank.watch.step(5)
    assert rank.injector.armed == (own,)
    assert rank.status[0] == "done"


def test_the_optimizers_moment_is_hit_in_another_element_behind_each_step(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.order(kind="flip", site="optimizer", layer=1, bit=30, steps=2)
    for done in range(4):
        rank.watch.step(done)
    assert (rank.moment != 0).tolist() == [True, True, False, False]
    assert not rank.injector.armed


def test_a_stall_happens_once(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.order(kind="stall")
    with pytest.raises(StandsStill):
        rank.watch.step(7)
    Rank(tmp_path, generation=2).watch.step(7)


def test_what_can_not_be_done_is_refused_with_a_remedy(tmp_path: Path) -> None:
    rank = Rank(tmp_path, measured=False)
    rank.order(kind="slow", share=0.3)
    rank.watch.step(0)
    assert rank.status[0] == "refused"
    assert "resilience.stragglers.action" in rank.status[1]
    rank.order(kind="flip", layer=2)
    rank.watch.step(1)
    assert rank.status == ("refused", "--layer 2: this rank has the layers 0, 1")
    rank.order(kind="flip", site="optimizer", layer=0)
    rank.watch.step(2)
    assert "keeps nothing of layer 0" in rank.status[1]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "soul"}, "kind is 'soul'; it is one of flip, slow, stall"),
        ({"kind": "stall", "steps": 3}, "stall has no field steps; it has none"),
        ({"kind": "flip", "site": "head"}, "site is 'head'; it is one of weight, gradient"),
        ({"kind": "flip", "rate": 0}, "rate is 0; it must be a number above 0 to 1"),
        ({"kind": "flip", "bit": 64}, "bit is 64; it must be a whole number from 0 to 63"),
        ({"kind": "slow", "share": 0.3, "steps": True}, "steps is True; it must be a whole number from 1"),
    ],
)
def test_what_is_no_order_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Order.parse(fields)


def test_a_slow_ranks_own_work_and_its_measure_are_longer_by_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    spun: list[float] = []
    monkeypatch.setattr(Drag, "spin", lambda _, seconds: spun.append(seconds))
    drag = Drag(CPU, 0.5)
    drag.work()
    drag.measured(0.2)
    drag.work()
    assert spun == [0.0, 0.1]
    drag.measured(0.3)  # the drag is in it
    drag.work()
    assert spun[2] == pytest.approx(0.1)
    yardstick = Yardstick(CPU)
    yardstick.measure()
    alone = yardstick.take()
    assert alone is not None
    yardstick.drag, spun[:] = drag, []
    yardstick.measure()
    assert spun == [0.5 * alone[0]] * 5


def test_own_work_takes_longer_on_the_host(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.order(kind="slow", share=2.0)
    told = []
    for done in range(3):
        rank.watch.step(done)
        with rank.work.windows():
            assert rank.work._own is not None
            rank.work._own.clock.add(0.0, 0.01)  # a window of 10 ms
        found = rank.work.take()
        assert found is not None
        told.append(found.compute)
    assert told[0] < 0.02, "nothing was measured yet"
    assert told[1] >= 0.03
    assert told[2] >= 0.03


def test_places_are_prepared_where_faults_may_be_made_everywhere_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(model: torch.nn.Module, *allowed: bool, compiled: bool = False) -> Any:
        orders = Orders("", "uid", 1, 1, 0, 0, 0, 1, 1, Rendezvous("", 1, ""), None, "")
        monkeypatch.setattr(faultwatch, "from_all", lambda _value, _group: list(allowed))
        return faultwatch.prepare(orders, [model], None, compiled=compiled)

    model = Decoder(CONFIG)
    block = model.blocks["0"]
    assert isinstance(block, Block)
    forward = block.ffn.forward
    assert ask(model, False, False) is None
    assert "rank 1's pod is from before" in ask(model, True, False)
    assert block.ffn.forward == forward
    assert "compile to false" in ask(model, True, True, compiled=True)
    assert "built-in decoder" in ask(torch.nn.Linear(2, 2), True)
    assert ask(model, True, True).layers == (0, 1)
    assert block.ffn.forward != forward


def test_the_first_moment_is_found_by_its_shape() -> None:
    query = torch.nn.Parameter(torch.zeros(2, 3))
    name = "blocks.1.attention.query.weight"
    state: dict[Tensor, dict[str, object]] = {
        query: {"step": torch.tensor(3.0), "exp_avg_sq": torch.ones(2, 3), "exp_avg": torch.zeros(2, 3)}
    }
    assert first_moment([(name, query)], state, 1) is state[query]["exp_avg"]
    assert first_moment([(name, query)], state, 0) is None
    assert first_moment([(name, query)], {}, 1) is None
