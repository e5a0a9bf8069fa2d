"""What the demonstration says while it works: one line per step with the time it took, and a live line in between.

A string is shown as it is; what has a style is a ``Text``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status
from rich.text import Text


@dataclass
class Story:
    """The story so far, with a clock."""

    console: Console = field(
        default_factory=lambda: Console(
            highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 400
        )
    )
    began: float = field(default_factory=time.monotonic)
    _status: Status | None = None
    _said: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def chapter(self, title: str) -> None:
        """A heading."""
        self.console.print(Text.assemble("\n", (title, "bold"), "  ", (_clock(self.elapsed), "dim")))

    def say(self, text: str | Text) -> None:
        """A line of its own."""
        self.console.print(Text.assemble("  ", text), soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A step: its name while it is done, its time when it is."""
        started = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"  … {title}")
        with self.console.status(Text(f"{title} …"), spinner="dots") as status:
            self._status = status
            try:
                yield
            except BaseException:
                self._mark("✗", "red", title, started)
                raise
            finally:
                self._status = None
        self._mark("✓", "green", title, started)

    def _mark(self, sign: str, colour: str, title: str, started: float) -> None:
        took = f"{time.monotonic() - started:.1f} s"
        self.console.print(Text.assemble("  ", (sign, colour), f" {title}  ", (took, "dim")))

    def progress(self, text: str) -> None:
        """What the present step is at; without a terminal a line every ten seconds."""
        if self._status is not None and self.console.is_terminal:
            self._status.update(Text(text))
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.console.print(f"    {_clock(self.elapsed)}  {text}", soft_wrap=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
