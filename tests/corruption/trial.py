"""What is injected: drawn by seed, the same on each machine. Plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, get_args

from corruption.setting import DENSE, MIXTURE, Setting
from lockstep_trainer.injection.bitflips import Fault, Site
from lockstep_trainer.parallel.layout import Layout
from lockstep_trainer.parallel.stages import modelled_costs, split_layers
from lockstep_trainer.replay.units import Units

SITES: tuple[Site, ...] = get_args(Site)
RATES = (1.0, 0.5, 0.1, 0.01)
"""Share of the micro-batches that a fault hits."""
Kind = Literal[
    "sampled",
    "unsampled",
    "other",
    "shard",
    "optimizer",
    "update",
    "sum",
    "between",
    "everywhere",
    "calibration",
    "spare",
    "delay",
]
"""When and where the fault strikes.

sampled: whatever the rank computes, on steps that are all replayed. unsampled: only on steps that are not replayed.
other: only in micro-batches behind the first. shard: a parameter's piece in the rank's memory, once. optimizer: its
first moment, once. update: the optimizer's update of a parameter's piece. sum: its piece of the gradient's sum over
ranks, once. between: a product, after its digest was taken and before it is added up over the tensor ranks. everywhere:
the same on every rank. calibration: from a generation's first step on. spare: whatever the rank computes, and where
nobody can say who is wrong a spare decides. delay: whatever the rank computes, on steps of which a share is replayed.
"""
HELD: tuple[Kind, ...] = ("shard", "optimizer", "update")
"""What no comparison of computations shows: each rank looks at its own memory, and updates are computed twice."""
_SMALL, _EXPERTS = replace(DENSE, layers=2), replace(MIXTURE, layers=2)
LAYOUTS: Mapping[str, Setting] = {
    "dp8": Setting(Layout(shard=8), _SMALL, samples=16),
    "hsdp2x4-bf16": Setting(Layout(replicate=2, shard=4), _SMALL, precision="bf16", samples=16),
    "dp4-tp2": Setting(Layout(shard=4, tensor=2), _SMALL, samples=16),
    "dp2-tp2-pp2": Setting(Layout(shard=2, tensor=2, pipeline=2), _SMALL, samples=16),
    "dp4-pp2": Setting(Layout(shard=4, pipeline=2), _SMALL, samples=16),
    "dp4-cp2": Setting(Layout(shard=4, context=2), _SMALL, samples=16),
    "dp8-ep2": Setting(Layout(shard=8, expert=2), _EXPERTS, samples=16),
    "dp2-tp2-cp2": Setting(Layout(shard=2, tensor=2, context=2), _SMALL, samples=16),
}
"""Of eight ranks."""
SLOW = Setting(Layout(shard=4), _SMALL, samples=8)
"""For what takes many steps."""
BOUND = 5
"""Steps that a trial has to find a fault that comes and goes."""
EARLY = 6
"""A fault that comes and goes strikes among the first times that it can, in the first two or three steps: before that,
steps are those of the clean run. Each draw is independent of those before, so that nothing else changes by it."""
STEPS: Mapping[Kind, int] = {"sampled": 1, "unsampled": 4, "optimizer": 3, "delay": 1000, "everywhere": 1}
"""Steps of a trial whose fault is always there; 2 where it isn't named."""
PIECE = 20
"""Trials within reach that a world does before the next layout's turn: each site with each rate."""
PIECE_BEYOND = 1
"""Of each kind that is not within reach."""
SHARES = (0.5, 0.25)
"""Shares of steps that are replayed in trials of the delay."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One injection."""

    name: str
    layout: str
    kind: Kind
    fault: Fault
    share: float = 1.0
    """Of the steps that are replayed."""
    bound: int = BOUND
    """Steps that are trained at most."""

    @property
    def setting(self) -> Setting:
        """What is trained."""
        return SLOW if self.layout == "delay" else LAYOUTS[self.layout]


def rounds(each: int, beyond: int, seed: int, layouts: Sequence[str]) -> Iterator[list[Trial]]:
    """The trials of a world after the other: layout by layout, a few of each, and again, so that a campaign that is
    stopped has seen all. ``each`` of what is within reach, ``beyond`` of each kind that is not, or barely."""
    for turn in range(max(-(-each // PIECE), -(-beyond // PIECE_BEYOND))):
        numbers = range(turn * PIECE, min((turn + 1) * PIECE, each))
        rest = range(turn * PIECE_BEYOND, min((turn + 1) * PIECE_BEYOND, beyond))
        for layout in layouts:
            yield [
                *(sampled(layout, number, seed) for number in numbers),
                *(out_of_reach(layout, kind, number, seed) for kind in kinds(layout) for number in rest),
            ]


def delays(each: int, seed: int) -> Iterator[list[Trial]]:
    """Trials of how long it takes, ``each`` of every share and rate, in pieces that mix them."""
    for number in range(each):
        yield [_delay(share, rate, number, seed) for share in SHARES for rate in RATES[:3]]


def kinds(layout: str) -> tuple[Kind, ...]:
    """Those besides «sampled» that make sense with a layout."""
    found: list[Kind] = ["unsampled", "other", *HELD, "sum", "everywhere", "calibration"]
    if LAYOUTS[layout].layout.tensor > 1:
        found.append("between")
    if Units(LAYOUTS[layout].layout).number == 2:
        found.append("spare")
    return tuple(found)


def sampled(layout: str, number: int, seed: int) -> Trial:
    """Sites and rates in turn, the rest drawn."""
    name = f"{layout}/sampled/{number}"
    drawn = random.Random(f"{seed}/{name}")
    rate = RATES[number % len(RATES)]  # five sites and four rates: all pairs in twenty
    fault = _striking_early(_draw(LAYOUTS[layout], drawn, number, rate), drawn)
    return Trial(name, layout, "sampled", fault, bound=STEPS["sampled"] if rate == 1 else BOUND)


def out_of_reach(layout: str, kind: Kind, number: int, seed: int) -> Trial:
    """One of a kind; high bits, which rounding does not take away."""
    name = f"{layout}/{kind}/{number}"
    drawn = random.Random(f"{seed}/{name}")
    fault = replace(_draw(LAYOUTS[layout], drawn, number, 1.0), bit=_high(LAYOUTS[layout], kind, drawn))
    if kind == "between":
        fault = replace(fault, site="product" if number % 2 else "activation")
    if kind == "update":
        fault = replace(fault, rate=(1.0, 0.1)[number % 2])
    if kind == "spare":
        return Trial(name, layout, kind, replace(fault, site=SITES[number % len(SITES)]), bound=2)
    return Trial(name, layout, kind, fault, share=0.25 if kind == "unsampled" else 1.0, bound=STEPS.get(kind, 2))


def _delay(share: float, rate: float, number: int, seed: int) -> Trial:
    name = f"delay/{share:g}/{rate:g}/{number}"
    fault = _draw(SLOW, random.Random(f"{seed}/{name}"), number, rate)
    # Sites and bits that rounding does not take away.
    fault = replace(fault, site=SITES[number % 4], bit=22 + number % 8)
    return Trial(name, "delay", "delay", fault, share=share, bound=STEPS["delay"])


def _draw(setting: Setting, drawn: random.Random, number: int, rate: float) -> Fault:
    rank = drawn.randrange(setting.layout.world_size)
    layers = split_layers(modelled_costs(setting.config, setting.length), setting.layout.stages)
    here = layers[setting.layout.coordinates(rank).pipeline]
    bits = 32 if setting.precision == "fp32" else 16
    return Fault(
        rank,
        SITES[number % len(SITES)],
        layer=drawn.choice(here),
        bit=drawn.randrange(bits),
        element=drawn.randrange(2**20),
        rate=rate,
        seed=drawn.randrange(2**20),
    )


def _high(setting: Setting, kind: Kind, drawn: random.Random) -> int:
    """A bit of the upper mantissa or the sign; of an optimizer's small number the second highest, which makes it large.
    What is held in memory is always float32."""
    if kind == "optimizer":
        return 30
    wide = setting.precision == "fp32" or kind in ("shard", "update", "sum")
    return drawn.choice((20, 21, 22, 31) if wide else (5, 6, 15))


def _striking_early(fault: Fault, drawn: random.Random) -> Fault:
    for _ in count():
        stream = fault.stream()
        if any(stream.random() < fault.rate for _ in range(EARLY)):
            return fault
        fault = replace(fault, seed=drawn.randrange(2**30))
    raise AssertionError
