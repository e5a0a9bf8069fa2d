"""A worker's output: copied to the agent's own, line by line, with step and rank, and given back to memory.

Workers write to a file in the memory-backed volume, so that neither the agent's death nor its slowness touches them.
What was copied is punched out of the file again, but for the tail that ``lockstep logs`` may ask for. Of a worker that
prints more than the container's log takes, the middle is left out: the file is in memory.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from pathlib import Path

from lockstep_api.tails import FATAL, LAST_LINES, as_shown, of_a_dump, searched
from lockstep_trainer.agent.containerlog import STDOUT, ContainerLog
from lockstep_trainer.supervisor import write_whole

_KEEP_BYTES = 256 * 1024
_PUNCH_BYTES = 1024 * 1024
_READ_BYTES = 256 * 1024
_UNWRITTEN_BYTES = 1024 * 1024
"""No more is read while so much waits to be written: all workers have their turn, and the agent its other work."""
_BEHIND_BYTES = 64 * 1024 * 1024
"""Less is never left out: a kubelet keeps 50 MiB of a container's log (containerLogMaxSize, containerLogMaxFiles)."""
_LONGEST_LINE = 16 * 1024
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_PAGE = 4096
_CRASH_LINES = 30
"""Of the fault handler's, the innermost of the stack; the rest of LAST_LINES is what came before."""
_FATAL = FATAL.encode()
_libc = ctypes.CDLL(None, use_errno=True)


class Output:
    """The reading end of one output.log."""

    def __init__(self, folder: Path, rank: int, log: ContainerLog = STDOUT) -> None:
        self._path = folder / "output.log"
        self._position = folder / "output.position"  # how far it was copied: a new agent goes on there
        self._rank = rank
        self._log = log
        self._file: int | None = None
        self._offset = self._copied = self._read_position()
        self._given: deque[tuple[int, int, int]] = deque()
        """What the log has not written yet: its ``written`` behind it, the number of bytes, the offset behind it."""
        self._unwritten = 0
        self._punched = 0
        self._partial = b""
        self.last: list[str] = []  # kept for the fault record
        self._dumped = 0  # lines of the fault handler's dump that goes on; 0 where there is none

    @property
    def waiting(self) -> bool:
        """Whether something was read that is not written yet, as far as is known."""
        return bool(self._given)

    def forward(self, step: int, *, final: bool = False) -> None:
        """Copy what is new: about 1 MiB of it, and the rest next time. ``final`` copies all of it, and an unfinished
        last line too."""
        if self._file is None:
            try:
                self._file = os.open(self._path, os.O_RDWR)
            except FileNotFoundError:
                return
        self._settle()
        if not final:
            self._leave_out(step)
        while (final or self._unwritten < _UNWRITTEN_BYTES) and (
            data := os.pread(self._file, _READ_BYTES, self._offset)
        ):
            self._offset += len(data)
            *lines, self._partial = (self._partial + data).split(b"\n")
            if len(self._partial) > _LONGEST_LINE:
                lines.append(self._partial)
                self._partial = b""
            self._emit(lines, step)
        if final and self._partial:
            lines, self._partial = [self._partial], b""
            self._emit(lines, step)

    def move(self, folder: Path) -> None:
        """The same file has a name in ``folder`` now."""
        self._path, self._position = folder / self._path.name, folder / self._position.name
        self._note()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _emit(self, lines: list[bytes], step: int) -> None:
        if not lines:
            return
        prefix = f"[step {step} rank {self._rank}] ".encode()
        data = b"".join(prefix + line + b"\n" for line in lines)
        self._given.append((self._log.give(data), len(data), self._offset - len(self._partial)))
        self._unwritten += len(data)
        self._keep(lines)

    def _keep(self, lines: list[bytes]) -> None:
        """The newest for the fault record; of a crash those where its stack begins. It may be a child's that crashed,
        and the worker goes on: what is no part of the dump ends it."""
        if not self._dumped and not any(line.startswith(_FATAL) for line in lines):
            lines = lines[-LAST_LINES:]  # of a worker that prints much the others need not be looked at
        kept = deque(self.last, LAST_LINES)
        for line in as_shown(line.decode(errors="replace") for line in lines):
            if line.startswith(FATAL):
                self._dumped = 1
            elif self._dumped:
                self._dumped = self._dumped + 1 if of_a_dump(line) else 0
            if self._dumped <= _CRASH_LINES:
                kept.append(line)
        self.last = searched(list(kept))

    def _settle(self) -> None:
        """Note what is written by now, and give its memory back."""
        before = self._copied
        while self._given and self._given[0][0] <= self._log.written:
            _, size, offset = self._given.popleft()
            self._unwritten -= size
            self._copied = max(self._copied, offset)
        if self._copied != before:
            self._note()

    def _leave_out(self, step: int) -> None:
        """Go on behind what can't be copied any more in a time that somebody would wait."""
        assert self._file is not None
        end = os.fstat(self._file).st_size - _UNWRITTEN_BYTES
        count = end - (self._offset - len(self._partial))
        if count < _BEHIND_BYTES:
            return
        self._offset = self._copied = end
        self._partial = b""
        self._emit([b"%d bytes are left out here: the log takes less than this worker prints" % count], step)
        self._note()

    def _note(self) -> None:
        write_whole(self._position, str(self._copied).encode())
        self._punch()

    def _punch(self) -> None:
        """Give whole pages back; file offsets stay, so the worker's appends are not disturbed."""
        end = (self._copied - _KEEP_BYTES) // _PAGE * _PAGE
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
