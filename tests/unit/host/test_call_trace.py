"""Stages of a call from the stamps of driver and worker."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from torchfedrpc.events import CallTimes
from torchfedrpc.host.call_trace import CallTrace, Stamps


def trace_of(stamps: Stamps | None, offset_s: float = 0.0) -> CallTrace:
    """The trace of a call that was submitted at 100 s and sent at 101 s."""
    trace = CallTrace(is_kept=True)
    trace.begin(100.0)
    trace.sent("worker1")
    trace.sent_at = 101.0
    trace.answered(stamps, offset_s)
    return trace


def test_stages_are_those_between_the_stamps() -> None:
    assert trace_of((103.0, 106.0, 110.0)).times(115.0) == CallTimes(4.0, 2.0, 4.0, 5.0)


def test_offset_of_the_clock_divides_the_time_on_the_way_alone() -> None:
    assert trace_of((3.0, 6.0, 10.0), offset_s=-100.0).times(115.0) == CallTimes(4.0, 2.0, 4.0, 5.0)
    assert trace_of((103.0, 106.0, 110.0), offset_s=60.0).times(115.0) == CallTimes(4.0, 0.0, 4.0, 7.0)
    assert trace_of((103.0, 106.0, 110.0), offset_s=-60.0).times(115.0) == CallTimes(4.0, 7.0, 4.0, 0.0)


def test_time_since_a_call_was_sent_counts_as_run_without_an_outcome() -> None:
    assert trace_of(None).times(115.0) == CallTimes(1.0, 0.0, 14.0, 0.0)


def test_call_that_was_not_sent_has_queue_alone() -> None:
    trace = CallTrace(is_kept=True)
    trace.begin(100.0)
    assert trace.times(103.0) == CallTimes(3.0, 0.0, 0.0, 0.0)


def test_earlier_attempts_count_as_queue() -> None:
    trace = trace_of((103.0, 106.0, 110.0))
    trace.sent("worker2")
    trace.sent_at = 112.0
    assert trace.times(115.0) == CallTimes(12.0, 0.0, 3.0, 0.0)
    assert trace.worker == "worker2"


def test_next_step_of_a_stream_begins_anew() -> None:
    trace = trace_of((103.0, 106.0, 110.0))
    trace.begin(120.0)
    assert trace.times(121.0) == CallTimes(1.0, 0.0, 0.0, 0.0)


def test_mode_that_records_no_stages_has_no_times() -> None:
    assert CallTrace().times(1.0) is None


@pytest.mark.parametrize("stamps", [(90.0, 95.0, 99.0), (10.0, 50.0, 400.0), (106.0, 103.0, 101.0)])
def test_stages_are_never_negative_and_sum_up(stamps: Stamps) -> None:
    times = trace_of(stamps).times(115.0)
    assert times is not None
    assert min(astuple(times)) >= 0
    assert sum(astuple(times)) == pytest.approx(15.0)
