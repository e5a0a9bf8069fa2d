"""The last lines of a worker's output, as messages and a job's status carry them. Whoever takes them in keeps to these
bounds, whatever it is told: a status that grows beyond what etcd takes can't be written any more, and its job not be
mended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LAST_LINES = 40
LINE_CHARACTERS = 500
TAIL_BYTES = 8 * 1024
"""Of all lines together, in UTF-8."""
SEARCHED_CHARACTERS = 4096
SEARCHED_BYTES = 64 * 1024
"""Likewise, of what an agent tells its leader, which looks for the patterns of resilience.retry in it: a structured
logger writes a whole stack into a line, and the error behind it. The leader keeps no more than above of what is judged:
thousands of workers may end at once."""
FATAL = "Fatal Python error: "
"""So begins what the interpreter's fault handler writes of a signal that ends it; the stack follows, its innermost
frame first."""
_OF_A_DUMP = (
    FATAL, "Python runtime state: ", "Current thread", "Thread 0x", "Stack (most recent call first)", "  File ",
    "  Binary file ", "  Garbage-collecting", "  <", "  ...", "...", "Extension modules: ",
)  # fmt: skip
"""So begin the lines of what it writes, unless they are empty."""


def tail(lines: Sequence[str]) -> list[str]:
    """The newest of ``lines``, as many as may be kept, the newest last; of a longer line its beginning."""
    return _newest(lines, LINE_CHARACTERS, TAIL_BYTES)


def searched(lines: Sequence[str]) -> list[str]:
    """Likewise, as many as are looked through for patterns."""
    return _newest(lines, SEARCHED_CHARACTERS, SEARCHED_BYTES)


def _newest(lines: Sequence[str], characters: int, left: int) -> list[str]:
    kept: list[str] = []
    for line in reversed(lines[-LAST_LINES:]):
        short = line if len(line) <= characters else line[: characters - 1] + "…"
        left -= len(short.encode(errors="replace"))
        if left < 0:
            break
        kept.append(short)
    return kept[::-1]


def as_shown(lines: Iterable[str]) -> list[str]:
    """The lines that a terminal would have shown one after the other: a carriage return ends one too, as between the
    states of a progress bar."""
    return [part for line in lines for part in ([one for one in line.split("\r") if one] or [""])]


def of_a_dump(line: str) -> bool:
    """Whether the fault handler may have written the line, where it comes behind others of its."""
    return not line or line.startswith(_OF_A_DUMP)
