"""Where a worker is, and how long it was where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lockstep_trainer.steprecord import StepWriter


class Sections:
    """Times the parts of a step and names the current one in the header of the step records."""

    def __init__(self, records: StepWriter, check: Callable[[], None] = lambda: None) -> None:
        """``check`` is called at the beginning of each."""
        self._records = records
        self.check = check
        """Raises where the worker must not go on."""
        self._seconds: dict[str, float] = {}
        self._current = ""
        self.annotate: Callable[[str], AbstractContextManager[object]] | None = None
        """Names a section in a profiler's trace while one is made."""

    @property
    def current(self) -> str:
        """The innermost section; empty outside of all."""
        return self._current

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run the body in section ``name``. Behind it the outer section goes on; its time includes the inner's."""
        self.check()
        outer, self._current = self._current, name
        self._records.section(name)
        begun = time.perf_counter()
        try:
            with self.annotate(name) if self.annotate else nullcontext():
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun
            self._current = outer
            if outer:
                self._records.section(outer)

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
