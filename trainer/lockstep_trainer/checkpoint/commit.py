"""How ``latest`` is swapped: a compare-and-swap that survives lost answers.

A sans-IO state machine: ``begin`` and ``step`` return what to do next, the caller does it and reports what happened.
The store may lose an answer before or after the put took effect; the client below may repeat a put and meet its own
write. So no refusal is believed before ``latest`` was read back:

* it is mine (term, nonce, target and sequence): success, a retry had met its own write;
* it belongs to a higher term: stop, another leads;
* it is still what I expected: the put never happened, try again;
* else somebody swapped it under me: the caller looks at the new value and decides anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep_trainer.checkpoint.manifest import Pointer

ATTEMPTS = 6
_PAUSES = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds before the 2nd, 3rd … attempt; about 2 s in all, then the caller tells the job's condition and comes back."""

# ------------------------------------------------------------------------------------------- what to do


@dataclass(frozen=True, slots=True)
class Put:
    """Put ``pointer`` under If-Match ``if_match``, or under If-None-Match where that is None, after a pause."""

    pointer: Pointer
    if_match: str | None
    pause: float = 0.0  # seconds


@dataclass(frozen=True, slots=True)
class Get:
    """Read ``latest``, after a pause."""

    pause: float = 0.0  # seconds


@dataclass(frozen=True, slots=True)
class Done:
    """``latest`` is, or has been, the pointer."""

    pointer: Pointer


@dataclass(frozen=True, slots=True)
class Moved:
    """``latest`` was swapped by somebody else, of no higher term. Nothing was written."""

    current: Pointer | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """``latest`` belongs to a higher term. Stop."""

    current: Pointer


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The store does not answer. The pointer may or may not be there."""


Outcome = Done | Moved | Lost | GaveUp
Effect = Put | Get | Outcome

# ----------------------------------------------------------------------------------------- what happened


@dataclass(frozen=True, slots=True)
class PutOk:
    """The put took effect."""


@dataclass(frozen=True, slots=True)
class PutRefused:
    """412: the condition does not hold now; whether it held for an earlier try of the same put is not known."""


@dataclass(frozen=True, slots=True)
class PutUnsure:
    """409, a server's error, no answer: it may or may not have taken effect."""


@dataclass(frozen=True, slots=True)
class GetOk:
    """``latest`` as it is; None for both where there is none."""

    current: Pointer | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class GetFailed:
    """No answer."""


Event = PutOk | PutRefused | PutUnsure | GetOk | GetFailed

# -------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap in progress: from ``expected`` (by its etag) to ``pointer``."""

    pointer: Pointer
    expected: str | None  # etag; None: there is no ``latest`` yet
    attempts: int = 1  # calls to the store that did not settle it, and the one under way


def begin(pointer: Pointer, expected: str | None) -> tuple[Swap, Effect]:
    """Start to swap ``latest`` from the version with etag ``expected`` to ``pointer``."""
    return Swap(pointer, expected), Put(pointer, expected)


def step(swap: Swap, event: Event) -> tuple[Swap, Effect]:
    """What to do after ``event``."""
    match event:
        case PutOk():
            return swap, Done(swap.pointer)
        case PutRefused() | PutUnsure():
            return swap, Get()
        case GetFailed():
            return _again(swap, Get())
        case GetOk(current, etag):
            if current == swap.pointer:
                return swap, Done(swap.pointer)
            if current is not None and current.term > swap.pointer.term:
                return swap, Lost(current)
            if etag == swap.expected:
                return _again(swap, Put(swap.pointer, swap.expected))
            return swap, Moved(current, etag)


def _again(swap: Swap, effect: Put | Get) -> tuple[Swap, Effect]:
    if swap.attempts >= ATTEMPTS:
        return swap, GaveUp()
    return replace(swap, attempts=swap.attempts + 1), replace(effect, pause=_PAUSES[swap.attempts - 1])
