"""Lines that say how far a long preparation is."""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_EVERY = 10.0  # seconds between two lines


class Progress:
    """Counts documents, and says so now and then. Preparations of less than ten seconds say nothing."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _EVERY
        self._subject = ""
        self._documents = 0
        self._begun = time.monotonic()

    def documents(self, subject: str, more: int, tokens: int | None = None) -> None:
        """``more`` documents of ``subject`` are done, ``tokens`` in all."""
        now = time.monotonic()
        if subject != self._subject:
            self._subject, self._documents, self._begun = subject, 0, now
        self._documents += more
        if now >= self._next:
            self._next = now + _EVERY
            rate = self._documents / max(1e-9, now - self._begun)
            written = "" if tokens is None else f", {tokens:,} tokens"
            log.info("preparing %s: %s documents%s (%.0f/s)", subject, f"{self._documents:,}", written, rate)

    def say(self, what: str) -> None:
        """One line at once."""
        log.info("preparing: %s", what)
