"""The worker's end of ``lockstep inject``: between two steps it looks for an order, and carries it out.

Only where the administrator allows faults (``orders.faults``). Then the places where bits can be flipped are prepared
at the generation's start (``bitflips``), and a step costs one ``stat`` of a file in memory and a call of Python in each
place. Nothing communicates: a rank's fault is no matter of the others.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep_trainer.agreement import from_all
from lockstep_trainer.config import Orders
from lockstep_trainer.errors import UserError
from lockstep_trainer.injection.bitflips import Fault, Injector, flip_bit
from lockstep_trainer.injection.faultorders import ORDER, STATUS, Order
from lockstep_trainer.measuring.workmeter import WorkMeter
from lockstep_trainer.supervisor import read_json, write_json

log = logging.getLogger(__name__)


def prepare(
    orders: Orders, parts: Sequence[nn.Module], control: dist.ProcessGroup | None, *, compiled: bool
) -> Injector | str | None:
    """Where bits can be flipped in a model that may have faults; a sentence where they can't, None where no faults may
    be made. Every rank calls it at the same time: the places are prepared on all or none of them."""
    allowed = from_all(orders.faults is not None, control)
    if not any(allowed):
        return None
    if not all(allowed):
        return f"rank {allowed.index(False)}'s pod is from before faults were allowed; it is so once all pods are newer"
    if compiled:
        return "bits can't be flipped within compiled blocks; set trainer.recipe.compile to false"
    try:
        return Injector(parts, orders.rank)
    except UserError:
        return "bits are flipped in the built-in decoder only; train a preset"


class FaultWatch:
    """One rank's."""

    def __init__(
        self,
        folder: Path,
        orders: Orders,
        *,
        injector: Injector | str | None,
        work: WorkMeter,
        moments: Callable[[int], Tensor | None],
        stand_still: Callable[[], NoReturn],
    ) -> None:
        """
        Args:
            folder: ``orders.faults``.
            orders: Whose rank and term they are.
            injector: What ``prepare`` gave.
            work: What makes the rank slow.
            moments: The optimizer's first moment of a layer's query weight; None where this rank has not got it.
            stand_still: Waits for the end of the generation, and raises.
        """
        self._folder, self._orders = folder, orders
        self._path = os.fspath(folder / ORDER)
        self._injector, self._work, self._moments, self._stand_still = injector, work, moments, stand_still
        self._base = injector.armed if isinstance(injector, Injector) else ()
        self._seen = 0  # order.json's time of change; 0: there was none
        self._order: Order | None = None
        self._left: int | None = None
        """Steps that it still strikes in; None: all."""
        self._striking = False
        self._drawn = random.Random()
        self._struck = 0

    def step(self, done: int) -> None:
        """Between two steps, of which ``done`` are behind. Raises what ``stand_still`` raises."""
        try:
            changed = os.stat(self._path).st_mtime_ns
        except OSError:
            changed = 0
        if changed != self._seen:
            self._seen = changed
            self._take()
        if self._order is not None:
            self._go_on(self._order, done + 1)

    # ------------------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        if self._order is not None:
            self._stop(self._order)
            self._say(self._order, "done", "it was withdrawn")
        self._order = None
        raw = read_json(Path(self._path))
        if raw is None:
            return
        order = Order(**raw)
        before = read_json(self._folder / STATUS) or {}
        if before.get("id") == order.id and before.get("state") in ("done", "refused"):
            return
        if problem := self._problem(order):
            self._say(order, "refused", problem)
            return
        known = before.get("id") == order.id  # an earlier generation has begun it
        self._left = before.get("left") if known else order.steps
        self._order = order
        # Other draws in each generation: steps that are done again would be hit alike.
        seed = f"{order.id}/{self._orders.epoch}/{self._orders.generation}"
        self._drawn, self._struck = random.Random(seed), 0

    def _problem(self, order: Order) -> str | None:
        """Why it can't be done here; None where it can."""
        if order.kind == "slow" and not self._work.can_drag:
            return (
                "the own work of this rank is not measured, by which it is made longer; set "
                "resilience.stragglers.action to Report, and choose a layout that docs/design/verdicts.md lists"
            )
        if order.kind != "flip":
            return None
        if not isinstance(self._injector, Injector):
            return self._injector or "no faults may be made here"
        if order.layer not in self._injector.layers:
            return f"--layer {order.layer}: this rank has the layers {', '.join(map(str, self._injector.layers))}"
        if order.site == "optimizer" and self._moments(order.layer) is None:
            return f"--site optimizer: the optimizer keeps nothing of layer {order.layer}'s query weight on this rank"
        return None

    def _go_on(self, order: Order, step: int) -> None:
        """``step`` comes next."""
        if self._left == 0:
            self._stop(order)
            self._say(order, "done", f"it struck in so many steps, the last was step {step - 1}")
            self._order = None
            return
        begins = not self._striking
        if self._left is not None:
            # Steps that are computed again count again: a device does not know which step it is.
            self._left -= 1
        if begins or self._left is not None:
            self._say(order, "striking", f"{'from' if begins else 'in'} step {step}{' on' if begins else ''}")
        if begins:
            log.warning("step %d: a fault made on purpose: %s", step, order.describe())
            self._begin(order)
        if order.kind == "flip" and order.site == "optimizer":
            self._strike_moment(order)

    def _begin(self, order: Order) -> None:
        self._striking = True
        if order.kind == "stall":
            self._say(order, "done", "it stands still until the generation is over")
            with suppress(FileNotFoundError):
                os.unlink(self._path)  # once
            self._stand_still()
        if order.kind == "slow":
            self._work.drag(order.share)
        elif order.site != "optimizer":
            assert isinstance(self._injector, Injector)
            fault = Fault(
                rank=self._orders.rank,
                site=order.site,
                layer=order.layer,
                bit=order.bit,
                element=order.element,
                rate=order.rate,
                seed=self._drawn.getrandbits(32),
            )
            self._injector.arm([*self._base, fault])

    def _stop(self, order: Order) -> None:
        if not self._striking:
            return
        self._striking = False
        if order.kind == "slow":
            self._work.drag(0)
        elif isinstance(self._injector, Injector):
            self._injector.arm(self._base)

    def _strike_moment(self, order: Order) -> None:
        """Another element each time: the same bit twice would be whole again."""
        moment = self._moments(order.layer)
        if moment is None or self._drawn.random() >= order.rate:
            return
        with torch.no_grad():
            flip_bit(moment, element=order.element + self._struck, bit=order.bit)
        self._struck += 1

    def _say(self, order: Order, state: str, message: str) -> None:
        status = {"id": order.id, "state": state, "message": message, "left": self._left}
        with suppress(FileNotFoundError):
            write_json(self._folder / STATUS, status)


def first_moment(
    parameters: Sequence[tuple[str, nn.Parameter]], state: Mapping[Tensor, Mapping[str, object]], layer: int
) -> Tensor | None:
    """What an optimizer keeps for the query weight of ``layer``, of its shape, the first by name; None where there is
    nothing."""
    for name, parameter in parameters:
        if name == f"blocks.{layer}.attention.query.weight":
            kept = sorted(state.get(parameter, {}).items())
            tensors = (value for _, value in kept if isinstance(value, Tensor) and value.shape == parameter.shape)
            return next(tensors, None)
    return None
