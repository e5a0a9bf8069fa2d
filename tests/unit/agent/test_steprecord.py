"""Step records: nothing torn is ever read, nothing is read twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockstep_trainer.steprecord import MAX_SECTIONS, STARTING, OwnStep, StepReader, StepRecordError, StepWriter

WHOLE = OwnStep(0.0, 512, 9000, 1e-3, 2e-3, 0.5, 0.25, 1.5, {"data": 0.0, "context": 0.5}, 0, 2e-3, 1980.0)
"""A rank of which all that there is was measured, in two dimensions of the mesh."""


def write(writer: StepWriter, step: int) -> None:
    writer.record(
        step=step, at=step * 1.5, seconds=0.5, loss=2.0, tokens=64, grad_norm=1.0, lr=1e-3, sections={"load": 0.25}
    )


def test_reader_sees_what_was_written(tmp_path: Path) -> None:
    """Each record once, with the sections that were spent; the header tells where the worker is."""
    with StepWriter.create(tmp_path / "steps", capacity=8) as writer:
        reader = StepReader(tmp_path / "steps")
        assert (reader.section, reader.new_records()) == (STARTING, [])
        writer.section("forward")
        write(writer, 1)
        assert reader.section == "forward"
        (record,) = reader.new_records()
        assert (record.step, record.at, record.sections) == (1, 1.5, {"load": 0.25})
        assert reader.new_records() == []


@pytest.mark.parametrize("mfu", [None, 0.0, 0.47])
def test_what_a_step_was_worth_arrives(tmp_path: Path, mfu: float | None) -> None:
    """An unknown utilisation stays unknown: it is not 0."""
    with StepWriter.create(tmp_path / "steps", capacity=2) as writer:
        writer.record(
            step=3, at=1.0, seconds=0.5, loss=2.0, tokens=64, grad_norm=1.0, lr=1e-3, sections={}, trained=160, mfu=mfu,
            memory=2**36,
        )  # fmt: skip
        (record,) = StepReader(tmp_path / "steps").new_records()
        assert (record.tokens, record.trained, record.mfu, record.memory) == (64, 160, mfu, 2**36)


@pytest.mark.parametrize("own", [None, OwnStep(0.25, 512, 9000), WHOLE])
def test_a_ranks_own_work_arrives(tmp_path: Path, own: OwnStep | None) -> None:
    """What was not measured stays unknown: it is not 0."""
    with StepWriter.create(tmp_path / "steps", capacity=2) as writer:
        writer.record(
            step=3, at=1.0, seconds=0.5, loss=2.0, tokens=64, grad_norm=1.0, lr=1e-3, sections={"load": 0.25}, own=own
        )
        (record,) = StepReader(tmp_path / "steps").new_records()
        assert (record.own, record.sections) == (own, {"load": 0.25})


def test_slow_reader_loses_the_oldest_and_knows_it(tmp_path: Path) -> None:
    """The worker never waits for its agent."""
    with StepWriter.create(tmp_path / "steps", capacity=4) as writer:
        reader = StepReader(tmp_path / "steps")
        for step in range(1, 11):
            write(writer, step)
        assert [record.step for record in reader.new_records()] == [7, 8, 9, 10]
        assert reader.lost == 6
        assert [record.step for record in StepReader(tmp_path / "steps").new_records()] == [7, 8, 9, 10]


def test_torn_record_is_left_for_later(tmp_path: Path) -> None:
    """Any flipped byte of a record keeps it, and what follows, from being read until it is whole again."""
    with StepWriter.create(tmp_path / "steps", capacity=4) as writer:
        write(writer, 1)
        path = tmp_path / "steps"
        for offset in range(1024, 1024 + 100):
            reader = StepReader(path)
            with path.open("r+b") as file:
                byte = os.pread(file.fileno(), 1, offset)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 0x40]), offset)
                assert reader.new_records() == []
                os.pwrite(file.fileno(), byte, offset)
            assert [record.step for record in reader.new_records()] == [1]


def test_what_is_no_ring_is_refused(tmp_path: Path) -> None:
    """Another version's file is never guessed at."""
    (tmp_path / "steps").write_bytes(b"x" * 4096)
    with pytest.raises(StepRecordError, match="no step records of this version"):
        StepReader(tmp_path / "steps")
    with pytest.raises(FileNotFoundError):
        StepReader(tmp_path / "nowhere")


def test_too_many_sections(tmp_path: Path) -> None:
    """The table of names has an end, and says so."""
    with StepWriter.create(tmp_path / "steps") as writer:
        for number in range(MAX_SECTIONS - 1):
            writer.section(f"section-{number}")
        with pytest.raises(ValueError, match="one too many"):
            writer.section("another")
        with pytest.raises(ValueError, match="longer than"):
            writer.section("x" * 25)
