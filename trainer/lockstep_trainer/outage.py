"""Waiting for a store: no training ends because the job's data can't be read for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from lockstep_trainer.errors import StoreError
from lockstep_trainer.protocol.progress import OUTAGE
from lockstep_trainer.sections import Sections
from lockstep_trainer.storage.retries import until_answered

log = logging.getLogger(__name__)

T = TypeVar("T")


def outlast(call: Callable[[], T], sections: Sections, sleep: Callable[[float], None] = time.sleep) -> T:
    """What ``call`` returns, tried again for as long as its store is away.

    Meanwhile the loop is in the section of that name, where no hang is found. ``call`` must give the same each time,
    and need no other rank: this one waits alone. Raises what else ``call`` raises, and Left where the generation ends
    meanwhile.
    """
    with ExitStack() as waiting:

        def away(error: StoreError) -> None:
            log.warning("%s; trying again for as long as it takes", error)
            if sections.current != OUTAGE:
                waiting.enter_context(sections(OUTAGE))

        return until_answered(call, away, sections.check, sleep)
