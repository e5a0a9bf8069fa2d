"""How commands speak: tables and colour for people, JSON for programs, plain lines where there is no terminal.

A string is shown as it is; what has a style is a ``Text``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

_WIDE = 400


class _Console(Console):
    """Of a reader that went away it tells whoever prints; the plain one ends the process where it stands."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's results go. Results are on standard output; progress and errors on standard error."""

    as_json: bool
    console: Console
    errors: Console

    @classmethod
    def open(cls, output: str) -> Output:
        """``output`` is ``text`` or ``json``."""
        # A file or a pipe has no width: lines are left whole there.
        width = None if sys.stdout.isatty() else _WIDE
        # Most of what is shown is not ours: a path, an error's text. Nothing in it is markup or the name of an emoji.
        plain = partial(_Console, highlight=False, markup=False, emoji=False)
        return cls(output == "json", plain(width=width), plain(stderr=True))

    @property
    def live(self) -> bool:
        """Whether a view may redraw itself."""
        return not self.as_json and self.console.is_terminal

    def result(self, value: dict[str, Any], text: RenderableType) -> None:
        """The command's answer, in one of its two forms."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2) + "\n")
            sys.stdout.flush()
        else:
            self.console.print(text, soft_wrap=True)

    def note(self, text: str | Text) -> None:
        """A line on the way; none in JSON mode."""
        if not self.as_json:
            self.console.print(text, soft_wrap=True)
