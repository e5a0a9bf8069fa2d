"""Waiting for a store: no training ends because the job's data can't be read for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import TypeVar

from lockstep_trainer.errors import StoreError
from lockstep_trainer.protocol.progress import OUTAGE
from lockstep_trainer.sections import Sections

log = logging.getLogger(__name__)

T = TypeVar("T")


def outlast(call: Callable[[], T], sections: Sections, sleep: Callable[[float], None] = time.sleep) -> T:
    """What ``call`` returns, tried again for as long as its store is away.

    Meanwhile the loop is in the section of that name, where no hang is found. ``call`` must give the same each time,
    and need no other rank: this one waits alone. Raises what else ``call`` raises, and Left where the generation ends
    meanwhile.
    """
    try:
        return call()
    except StoreError as error:
        problem = _temporary(error)
    with sections(OUTAGE):
        for pause in _pauses():
            log.warning("%s; trying again in %.0f s, for as long as it takes", problem, pause)
            sleep(pause)
            sections.check()
            try:
                return call()
            except StoreError as error:
                problem = _temporary(error)
    raise AssertionError("pauses have no end")


def _temporary(error: StoreError) -> StoreError:
    if not error.temporary:
        raise error
    return error


def _pauses() -> Iterator[float]:
    """Seconds; short enough that a generation that ends is left in time."""
    return chain((1.0, 2.0), repeat(5.0))
