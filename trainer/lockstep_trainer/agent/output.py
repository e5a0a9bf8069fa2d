"""A worker's output: copied to the agent's own, line by line, with step and rank, and given back to memory.

Workers write to a file in the memory-backed volume, so that neither the agent's death nor its slowness touches them.
What was copied is punched out of the file again, but for the tail that ``lockstep logs`` may ask for.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from pathlib import Path

LAST_LINES = 40
"""Lines kept for the fault record."""
_KEEP_BYTES = 256 * 1024
_PUNCH_BYTES = 1024 * 1024
_READ_BYTES = 256 * 1024
_LONGEST_LINE = 16 * 1024
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


class Output:
    """The reading end of one output.log."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / "output.log"
        self._position = folder / "output.position"  # how far it was copied: a new agent goes on there
        self._rank = rank
        self._file: int | None = None
        self._offset = self._read_position()
        self._punched = 0
        self._partial = b""
        self.last: deque[str] = deque(maxlen=LAST_LINES)

    def forward(self, step: int, *, final: bool = False) -> None:
        """Copy what is new. ``final`` copies an unfinished last line too."""
        if self._file is None:
            try:
                self._file = os.open(self._path, os.O_RDWR)
            except FileNotFoundError:
                return
        moved = False
        while data := os.pread(self._file, _READ_BYTES, self._offset):
            self._offset += len(data)
            moved = True
            *lines, self._partial = (self._partial + data).split(b"\n")
            if len(self._partial) > _LONGEST_LINE:
                lines.append(self._partial)
                self._partial = b""
            self._emit(lines, step)
        if final and self._partial:
            self._emit([self._partial], step)
            self._partial = b""
        if moved:
            self._position.write_text(str(self._offset - len(self._partial)))
            self._punch()

    def move(self, folder: Path) -> None:
        """The same file has a name in ``folder`` now."""
        self._path, self._position = folder / self._path.name, folder / self._position.name
        self._position.write_text(str(self._offset - len(self._partial)))

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _emit(self, lines: list[bytes], step: int) -> None:
        if not lines:
            return
        prefix = f"[step {step} rank {self._rank}] ".encode()
        sys.stdout.buffer.write(b"".join(prefix + line + b"\n" for line in lines))
        sys.stdout.buffer.flush()
        self.last.extend(line.decode(errors="replace") for line in lines[-LAST_LINES:])

    def _punch(self) -> None:
        """Give whole pages back; file offsets stay, so the worker's appends are not disturbed."""
        end = (self._offset - _KEEP_BYTES) // _PAGE * _PAGE
        if self._file is None or end - self._punched < _PUNCH_BYTES:
            return
        _libc.fallocate(
            self._file,
            _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE,
            ctypes.c_int64(self._punched),
            ctypes.c_int64(end - self._punched),
        )
        self._punched = end

    def _read_position(self) -> int:
        try:
            return int(self._position.read_text())
        except (FileNotFoundError, ValueError):
            return 0


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of an output.log, newest last; raises FileNotFoundError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _KEEP_BYTES))
        data = file.read().replace(b"\0", b"")
    return data.decode(errors="replace").splitlines()[-lines:]
