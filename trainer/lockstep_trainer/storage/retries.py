"""Trying again what failed for a moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import TypeVar

from lockstep_trainer.errors import Conflict, StoreError

_TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds

T = TypeVar("T")


def persistently(call: Callable[[], T], sleep: Callable[[float], None] | None = None, tries: int = _TRIES) -> T:
    """What ``call`` returns, tried again where it raises a temporary StoreError.

    Pauses grow and are drawn at random: hundreds of agents that a busy store turned away must not come back at once. A
    Conflict is the caller's to decide. Raises the last error.
    """
    for number in range(tries):
        try:
            return call()
        except Conflict:
            raise
        except StoreError as error:
            if not error.temporary or number == tries - 1:
                raise
        (sleep or time.sleep)(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number)))
    raise AssertionError("not reached")


def until_answered(
    call: Callable[[], T],
    problem: Callable[[StoreError], None],
    check: Callable[[], None],
    sleep: Callable[[float], None] | None = None,
) -> T:
    """What ``call`` returns, tried again for as long as the store is away, where nothing else is left to do.

    ``problem`` hears of each failure; ``check`` raises, before and behind each pause, where nobody waits any longer.
    Raises any other error of ``call``.
    """
    for pause in chain((1.0, 2.0), repeat(5.0)):
        try:
            return call()
        except StoreError as error:
            if not error.temporary:
                raise
            problem(error)
        check()
        (sleep or time.sleep)(pause)
        check()
    raise AssertionError("not reached")
