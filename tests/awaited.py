"""Waiting for what can only be asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(question: Callable[[], T], what: str, seconds: float = 60.0, *, pause: float = 0.1) -> T:
    """The first answer that is true, asked for every ``pause`` seconds, or half of the time where the answer takes
    longer than that: a question that starts a program should leave what it waits for some CPU.

    ``what`` is what is waited for; raises AssertionError that says so where it did not come in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if answer := question():
            return answer
        now = time.monotonic()
        assert now < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(max(pause, now - asked))
