"""A worker's clock, compared with the driver's by calls and outcomes."""

from __future__ import annotations

import pytest

from torchfedrpc.rpc import worker_clock
from torchfedrpc.rpc.worker_clock import WorkerClock


class Time:
    """The driver's clock, as a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(worker_clock, "time", time)
    return time


def exchange(clock: WorkerClock, time: Time, there_s: float, run_s: float, back_s: float, ahead_s: float) -> None:
    sent_at = time.now
    received = sent_at + there_s + ahead_s
    time.now += there_s + run_s + back_s
    clock.note(sent_at, (received, received, received + run_s))


def test_offset_comes_from_the_fastest_exchange(time: Time) -> None:
    clock = WorkerClock()
    exchange(clock, time, 8.0, 1.0, 0.5, ahead_s=50.0)
    assert clock.offset_s == pytest.approx(50.0, abs=8.5 / 2)
    exchange(clock, time, 0.01, 5.0, 0.01, ahead_s=50.0)
    assert clock.offset_s == pytest.approx(50.0)
    assert clock.round_trip_s == pytest.approx(0.02)
    exchange(clock, time, 3.0, 5.0, 0.1, ahead_s=50.0)
    assert clock.offset_s == pytest.approx(50.0)


def test_old_exchange_gives_way_as_clocks_drift(time: Time) -> None:
    clock = WorkerClock()
    exchange(clock, time, 0.01, 0.0, 0.01, ahead_s=50.0)
    time.now += 3600
    exchange(clock, time, 0.02, 0.0, 0.02, ahead_s=50.1)
    assert clock.offset_s == pytest.approx(50.1)


def test_common_clock_has_no_offset(time: Time) -> None:
    clock = WorkerClock()
    clock.is_common = True
    exchange(clock, time, 8.0, 1.0, 0.5, ahead_s=0.0)
    assert clock.offset_s == 0.0
    assert clock.round_trip_s == pytest.approx(8.5)
