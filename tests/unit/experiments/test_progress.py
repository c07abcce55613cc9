"""What a run shows while it goes on."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from conftest import needs

from torchfedrpc.events import CallEnded, CallStarted, RoundEnded, RoundStarted
from torchfedrpc.experiments import progress
from torchfedrpc.experiments.progress import LineProgress, live_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_stream_that_is_no_terminal_gets_a_line_for_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    times_s = iter([0.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times_s)))
    with LineProgress(stream) as show:
        for round_num, accuracy in enumerate((0.5, 0.75, 0.875)):
            show(RoundStarted(round_num, 10))
            show(RoundEnded(round_num, 10, {"test_accuracy": accuracy, "num_clients": 4}))
    assert stream.getvalue().splitlines() == [
        "round  1/10  accuracy 0.500  4 clients  45 s left",
        "round  2/10  accuracy 0.750  4 clients  8 s left",  # the first round's start-up no longer counts
        "round  3/10  accuracy 0.875  4 clients  7 s left",
    ]


def test_the_last_line_has_no_time_left() -> None:
    stream = io.StringIO()
    with LineProgress(stream) as show:
        show(RoundEnded(0, 1, {"train_loss": 0.25}))
    assert stream.getvalue() == "round 1/1  train loss 0.250\n"


def test_a_terminal_gets_a_bar() -> None:
    needs("rich")
    stream = Terminal()
    with live_progress(stream) as show:
        show(RoundStarted(0, 20))
        show(CallStarted(1, "client_1", "train_epoch"))
        show(CallStarted(2, "client_2", "train_epoch"))
        show(CallEnded(1, "client_1", "train_epoch", 0.1, None))
        show(RoundEnded(6, 20, {"test_accuracy": 0.875}))
    shown = stream.getvalue()
    assert "7/20" in shown
    assert "1 in flight" in shown
    assert "accuracy 0.875" in shown


def test_the_bar_shows_the_time_left_as_the_last_rounds_took(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("rich")
    from torchfedrpc.experiments.progress_bar import BarProgress

    stream, now_s = Terminal(), 0.0
    monkeypatch.setattr("rich.console.monotonic", lambda: now_s)
    with BarProgress(stream) as show:
        for round_num, seconds in enumerate((50.0, 10.0, 10.0)):  # the first one loads data and libraries
            show(RoundStarted(round_num, 12))
            now_s += seconds
            show(RoundEnded(round_num, 12, {}))
    assert "3/12" in stream.getvalue()
    assert "0:01:30" in stream.getvalue().rpartition("3/12")[2]


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert isinstance(live_progress(Terminal()), LineProgress)
