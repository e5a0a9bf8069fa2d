"""What workers print reaches the container's log, and neither they nor the agent wait for whoever reads that."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from lockstep_trainer.agent import output
from lockstep_trainer.agent.containerlog import ContainerLog, Records
from lockstep_trainer.agent.output import Output

MIB = 1024 * 1024
LINE = b"a line of 64 bytes, as a library prints them again and again...\n"


class Pipe:
    """The container's log as a runtime reads it, or does not."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.log = ContainerLog(self.writing)
        self._text = b""

    def read(self, until: bytes) -> list[str]:
        """All lines up to the first that ends so."""
        while not self._text.endswith(until + b"\n"):
            self._text += os.read(self.reading, MIB)
        return self._text.decode().splitlines()

    def drain(self) -> None:
        """Read until all is written that the log was given."""
        while self.log.unwritten:
            self._text += os.read(self.reading, MIB)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self.reading)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def say(folder: Path, data: bytes) -> None:
    with (folder / "output.log").open("ab") as file:
        file.write(data)


def in_memory(folder: Path) -> int:
    return (folder / "output.log").stat().st_blocks * 512


def settle(log: ContainerLog, *outputs: Output) -> None:
    """Until all that they have read is written."""
    deadline = time.monotonic() + 20
    while any(one.waiting for one in outputs):
        assert time.monotonic() < deadline
        time.sleep(0.001)
        for one in outputs:
            one.forward(1)


def test_lines_come_in_order_with_step_and_rank(tmp_path: Path, pipe: Pipe) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    outputs = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        outputs.append(Output(folder, rank, pipe.log))
    say(folders[0], b"one\ntwo\nthr")
    say(folders[1], b"other\n")
    for one in outputs:
        one.forward(3)
    say(folders[0], b"ee\nlast")
    outputs[0].forward(4)
    outputs[0].forward(4, final=True)
    assert pipe.read(b"last") == [
        "[step 3 rank 0] one", "[step 3 rank 0] two", "[step 3 rank 1] other", "[step 4 rank 0] three",
        "[step 4 rank 0] last",
    ]  # fmt: skip
    assert list(outputs[0].last) == ["one", "two", "three", "last"]


def test_a_worker_that_prints_without_a_pause_holds_its_agent_up_for_a_mebibyte_at_most(
    tmp_path: Path, pipe: Pipe
) -> None:
    own = Output(tmp_path, 0, pipe.log)
    size = 16 * MIB
    say(tmp_path, LINE * (size // len(LINE) - 1) + b"done".ljust(len(LINE) - 1) + b"\n")
    reader = threading.Thread(target=pipe.read, args=(b"done".ljust(len(LINE) - 1),))
    reader.start()
    seen, deadline = [0], time.monotonic() + 20
    while seen[-1] < size or own.waiting:
        assert time.monotonic() < deadline
        own.forward(1)
        seen.append(own._offset)
        time.sleep(0.001)
    assert max(after - before for before, after in pairwise(seen)) <= 1.25 * MIB
    assert in_memory(tmp_path) < 2 * MIB, "what was written is given back"
    reader.join()


def test_nobody_waits_for_a_log_that_stands_still_and_nothing_is_lost(tmp_path: Path, pipe: Pipe) -> None:
    own = Output(tmp_path, 0, pipe.log)
    numbers = range(200_000)
    say(tmp_path, b"".join(b"%d\n" % number for number in numbers))
    for _ in range(20):
        own.forward(1)  # comes back
    assert own._unwritten < 8 * MIB
    own.forward(1, final=True)
    assert own.last[-1] == str(numbers[-1])
    begun = time.monotonic()
    asyncio.run(pipe.log.flush(0.1))
    assert time.monotonic() - begun < 10
    assert pipe.read(b" %d" % numbers[-1]) == [f"[step 1 rank 0] {number}" for number in numbers]


def test_a_new_agent_goes_on_behind_what_the_one_before_has_written(tmp_path: Path, pipe: Pipe) -> None:
    before = Output(tmp_path, 0, pipe.log)
    say(tmp_path, b"one\n")
    before.forward(1)
    settle(pipe.log, before)
    say(tmp_path, LINE * (MIB // len(LINE)))
    before.forward(1)
    before.forward(1)  # it is killed while most of it waits to be written
    other = Pipe()
    Output(tmp_path, 0, other.log).forward(1)
    assert other.read(LINE[:-1])[0] == f"[step 1 rank 0] {LINE.decode().strip()}"
    other.close()


def test_the_position_is_replaced_as_a_whole(tmp_path: Path, pipe: Pipe) -> None:
    """An agent that is killed while it writes leaves the old one."""
    own = Output(tmp_path, 0, pipe.log)
    say(tmp_path, b"one\n")
    own.forward(1)
    settle(pipe.log, own)
    os.link(tmp_path / "output.position", tmp_path / "before")
    say(tmp_path, b"two\n")
    own.forward(1)
    settle(pipe.log, own)
    assert [(tmp_path / name).read_text() for name in ("before", "output.position")] == ["4", "8"]


def test_the_middle_is_left_out_where_the_log_takes_less_than_is_printed(
    tmp_path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fill the volume, which is the memory of the pod."""
    monkeypatch.setattr(output, "_BEHIND_BYTES", 4 * MIB)
    own = Output(tmp_path, 0, pipe.log)
    for _ in range(8):
        say(tmp_path, LINE * (4 * MIB // len(LINE)))
        own.forward(1)
    assert in_memory(tmp_path) < 8 * MIB
    say(tmp_path, b"done\n")
    own.forward(1, final=True)
    lines = pipe.read(b"done")
    left_out = [int(line.split()[4]) for line in lines if line.endswith("the log takes less than this worker prints")]
    there = lines.count(f"[step 1 rank 0] {LINE.decode().strip()}")
    assert len(left_out) >= 3
    assert sum(left_out) + there * len(LINE) == 32 * MIB, "what is not there was said"


def test_a_log_that_nobody_reads_any_more_takes_everything(tmp_path: Path, pipe: Pipe) -> None:
    pipe.close()
    own = Output(tmp_path, 0, pipe.log)
    say(tmp_path, LINE)
    own.forward(1)
    settle(pipe.log, own)
    assert (tmp_path / "output.position").read_text() == str(len(LINE))


def test_the_agent_does_not_wait_for_whoever_reads_its_own_log(pipe: Pipe) -> None:
    """A node whose container runtime stands still would else lose its member: it would not answer its leader."""
    handler = Records(pipe.log)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def note(text: str) -> None:
        handler.handle(logging.LogRecord("agent", logging.INFO, "agent.py", 1, "%s", (text,), None))

    for number in range(40_000):
        note(f"{number} {'x' * 100}")
    assert pipe.log.unwritten < 2 * MIB
    pipe.drain()
    note("heard again")
    said = pipe.read(b"heard again")[:-1]
    left_out = [
        line for line in said if line.endswith(" lines of the agent are left out here: nobody has read its log")
    ]
    assert said[-1] in left_out
    kept = len(said) - len(left_out)
    assert kept < 20_000
    assert kept + sum(int(line.split()[0]) for line in left_out) == 40_000
