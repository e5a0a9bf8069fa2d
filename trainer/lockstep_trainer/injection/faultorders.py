"""Faults that an administrator orders of a worker (``lockstep inject``), and the files that carry them.

In the agent's run folder, for each of the node's devices, by local rank::

    faults/<local rank>/order.json     written by the agent; taken away where the fault is to end
    faults/<local rank>/status.json    {id, state, message, left}, written by the worker

They belong to the device and not to a generation: whichever worker comes next there goes on with the fault, as it would
with broken hardware. Standard library only: both sides import it.
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

FOLDER = "faults"
ORDER = "order.json"
STATUS = "status.json"

Kind = Literal["flip", "slow", "stall"]
FlipSite = Literal["weight", "gradient", "optimizer", "activation", "product", "inputGradient"]
State = Literal["ordered", "striking", "done", "refused"]
"""ordered: no worker has seen it. striking: from a step on. done: its steps are over, or it was withdrawn. refused: it
can't be done here."""
SITES: tuple[str, ...] = get_args(FlipSite)

_FIELDS: dict[str, dict[str, Any]] = {
    "flip": {"site": "weight", "layer": 0, "bit": 30, "element": 0, "rate": 1.0, "steps": None},
    "slow": {"share": 0.3, "steps": None},
    "stall": {},
}


@dataclass(frozen=True, slots=True)
class Order:
    """One fault of one device."""

    id: str
    kind: Kind
    steps: int | None = None
    """For so many steps, those that are computed again counted again; None: until it is withdrawn."""
    site: FlipSite = "weight"
    layer: int = 0
    bit: int = 30
    """Of the element, modulo its size."""
    element: int = 0
    """Of the rank's own values, modulo their number."""
    rate: float = 1.0
    """Share of the micro-batches (optimizer: of the steps) that are hit."""
    share: float = 0.0
    """Of a slow rank: its own work takes longer by this share."""

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Order:
        """An order with a new id, from the fields of a request; raises ValueError with a sentence."""
        kind = raw.get("kind")
        if kind not in _FIELDS:
            raise ValueError(f"kind is {kind!r}; it is one of {', '.join(_FIELDS)}")
        fields = _FIELDS[kind]
        if unknown := set(raw) - {"kind", *fields}:
            raise ValueError(f"{kind} has no field {min(unknown)}; it has {', '.join(fields) or 'none'}")
        given = {**fields, **{name: value for name, value in raw.items() if name != "kind"}}
        for name, value in given.items():
            _check(name, value)
        return cls(uuid.uuid4().hex[:12], cast("Kind", kind), **given)

    def document(self) -> dict[str, Any]:
        """What ``order.json`` holds."""
        return asdict(self)

    def describe(self) -> str:
        """A clause without a full stop."""
        lasts = "" if self.steps is None else f", for {self.steps} step{'' if self.steps == 1 else 's'}"
        if self.kind == "stall":
            return "it does not come to its next collective"
        if self.kind == "slow":
            return f"its own work takes {self.share:.0%} longer{lasts}"
        often = "each time" if self.rate == 1 else f"in {self.rate:.3g} of all cases"
        return f"bit {self.bit} of {_SITE_WORDS[self.site]} of layer {self.layer} flips {often}{lasts}"


_SITE_WORDS: dict[str, str] = {
    "weight": "the query weight, as it is read,",
    "gradient": "the query weight's gradient",
    "optimizer": "the optimizer's first moment of the query weight",
    "activation": "the feed-forward part's output",
    "product": "the query projection",
    "inputGradient": "the feed-forward part's input gradient",
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "layer": (0, 10_000),
    "bit": (0, 63),
    "element": (0, 1 << 40),
    "rate": (0, 1),
    "share": (0, 100),
    "steps": (1, 1 << 40),
}


def _check(name: str, value: Any) -> None:
    if name == "steps" and value is None:
        return
    if name == "site":
        if value not in SITES:
            raise ValueError(f"site is {value!r}; it is one of {', '.join(SITES)}")
        return
    low, high = _BOUNDS[name]
    whole = name not in ("rate", "share")
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high or (not whole and value == 0):
        what = "a whole number" if whole else "a number above"
        raise ValueError(f"{name} is {value!r}; it must be {what} {'from ' if whole else ''}{low:g} to {high:g}")
