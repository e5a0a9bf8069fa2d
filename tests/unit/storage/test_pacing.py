"""A bounded rate, on a clock of the test's own, and bodies that can be sent twice."""

from __future__ import annotations

import pytest

from lockstep_trainer.errors import Conflict, NotFound, StoreError
from lockstep_trainer.storage.pacing import Bandwidth, Body, shared
from lockstep_trainer.storage.retries import persistently


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_what_is_sent_keeps_to_the_rate() -> None:
    clock = Clock()
    bandwidth = Bandwidth(1000, clock, clock.sleep)
    for _ in range(11):
        bandwidth.take(500)
    assert clock.now == pytest.approx(5.0)  # the last one's own half second is not waited for


def test_a_pause_is_not_made_up_for() -> None:
    clock = Clock()
    bandwidth = Bandwidth(1000, clock, clock.sleep)
    bandwidth.take(500)
    clock.now = 100.0
    for _ in range(3):
        bandwidth.take(500)
    assert clock.now == pytest.approx(101.0)


def test_uploads_of_one_rate_share_it_and_without_a_rate_nothing_waits() -> None:
    assert shared(None) is None
    assert shared(123_456) is shared(123_456)
    assert shared(123_456) is not shared(123_457)


def test_a_body_is_read_in_place_and_again_from_its_start() -> None:
    data = bytearray(range(256)) * 4096
    body = Body(memoryview(data))
    assert len(body) == len(data)
    for _ in range(2):
        pieces = []
        while piece := body.read(16_384):
            assert piece.obj is data
            pieces.append(bytes(piece))
        assert b"".join(pieces) == data
        assert body.tell() == len(data)
        assert body.seek(0) == 0
    assert body.read() == data
    assert body.seek(0, 2) == len(data)
    assert body.seek(-10, 1) == len(data) - 10
    assert body.read(3) == data[-10:]


def test_a_body_takes_its_bandwidth_before_it_hands_out() -> None:
    clock = Clock()
    body = Body(bytes(1 << 20), Bandwidth(1 << 20, clock, clock.sleep))
    while body.read(1):
        pass
    assert clock.now == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (StoreError("x", temporary=True), 4),
        (StoreError("x"), 1),
        (NotFound("x"), 1),
        (Conflict("x", temporary=True), 1),
    ],
)
def test_only_what_may_pass_is_tried_again(error: StoreError, calls: int) -> None:
    seen: list[None] = []
    waits: list[float] = []

    def fail() -> None:
        seen.append(None)
        raise error

    with pytest.raises(StoreError) as caught:
        persistently(fail, waits.append)
    assert caught.value is error
    assert len(seen) == calls
    assert len(waits) == calls - 1
    assert all(0 <= wait <= 0.5 * 2**number for number, wait in enumerate(waits))


def test_a_later_success_is_the_result() -> None:
    results = iter([StoreError("x", temporary=True), StoreError("y", temporary=True), 7])

    def call() -> int:
        result = next(results)
        if isinstance(result, StoreError):
            raise result
        return result

    assert persistently(call, lambda _: None) == 7
