"""What a run shows while it goes on."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import needs

from torchfedrpc.events import CallEnded, CallStarted, RoundEnded, RoundStarted
from torchfedrpc.experiments.progress import live_progress
from torchfedrpc.experiments.progress.lines import LineProgress
from torchfedrpc.experiments.progress.run_status import RunStatus


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_stream_that_is_no_terminal_gets_a_line_for_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    times_s = iter([0.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(
        "torchfedrpc.experiments.progress.run_status.time", SimpleNamespace(monotonic=lambda: next(times_s))
    )
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


STATS: dict[str, Any] = {
    "bytes_sent": 12_345_678,
    "bytes_received": 999,
    "workers_lost": 0,
    "workers": {"worker1": {"learners": 5}, "worker2": {"learners": 4}},
}
FULL_STATS = {
    **STATS,
    "workers_lost": 1,
    "workers": {
        f"worker{number}": {
            "learners": 3,
            "state": "serving",
            "queue": 2,
            "memory_bytes": 412_345_678,
            "busy_s": 0.5,
        }
        for number in range(1, 12)
    },
}


def shown(view: Any) -> list[str]:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=100).print(view)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


async def test_a_terminal_gets_a_view() -> None:
    needs("rich")
    stream = Terminal()
    with live_progress(stream, lambda: STATS) as show:
        show(RoundStarted(0, 20))
        show(CallStarted(1, "client_1", "train_epoch"))
        show(CallEnded(1, "client_1", "train_epoch", 0.1, None))
        show(RoundEnded(6, 20, {"test_accuracy": 0.875}))
    text = stream.getvalue()
    assert "7/20" in text
    assert "accuracy 0.875" in text
    assert "\x1b[?25h" in text  # the cursor is visible
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


async def test_the_cursor_is_visible_while_the_view_is_drawn() -> None:
    needs("rich")
    stream = Terminal()
    with live_progress(stream, lambda: STATS):
        assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_the_view_has_rounds_calls_and_what_is_known_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("rich")
    from torchfedrpc.experiments.progress.terminal_view import Workers, view_of

    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s)
    monkeypatch.setattr("torchfedrpc.experiments.progress.run_status.time", clock)
    monkeypatch.setattr("torchfedrpc.experiments.progress.terminal_view.time", clock)
    status, workers = RunStatus(), Workers()
    for call in range(3):
        status.add(CallStarted(call, f"client_{call}", "train_epoch"))
    status.add(CallEnded(0, "client_0", "train_epoch", 1.5, None))
    assert shown(view_of(status, STATS, workers, 100))[1:] == [
        "2 calls in flight   1 done   sent 12.3 MB   received 999 B",
        "worker   learners",
        "worker1         5",
        "worker2         4",
    ]
    view_of(status, FULL_STATS, workers, 100)
    now_s = 4.0
    for facts in FULL_STATS["workers"].values():
        facts["busy_s"] = 2.5
    lines = shown(view_of(status, FULL_STATS, workers, 100))
    assert lines[1:5] == [
        "2 calls in flight for 4 s   1 done   sent 12.3 MB   received 999 B   workers lost: 1",
        "stragglers: client_1 train_epoch 4 s, client_2 train_epoch 4 s",
        "worker      state    learners  queue  memory  busy",
        "worker1     serving         3      2  412 MB   50%",
    ]
    assert lines[-1] == "and 3 more"


def test_the_view_shows_the_time_left_as_the_last_rounds_took(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("rich")
    from torchfedrpc.experiments.progress.terminal_view import round_lines

    now_s = 0.0
    monkeypatch.setattr("torchfedrpc.experiments.progress.run_status.time", SimpleNamespace(monotonic=lambda: now_s))
    status = RunStatus()
    for round_num, seconds in enumerate((50.0, 10.0, 10.0)):  # the first one loads data and libraries
        now_s += seconds
        status.add(RoundEnded(round_num, 12, {}))
    (line,) = shown(round_lines(status, 100)[0])
    assert line.endswith("3/12 90 s left")


async def test_what_is_logged_and_printed_is_above_the_view() -> None:
    needs("rich")
    stream = Terminal()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with live_progress(stream, lambda: STATS):
            logging.getLogger("torchfedrpc.test").warning("a disk is full")
            assert handler.stream is not stream
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
    before, _, after = stream.getvalue().partition("a disk is full")
    assert "worker2" in before  # which is erased, and drawn again below
    assert "worker2" in after


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_of_the_view_needs_no_network(ending: str, tmp_path: Path) -> None:
    needs("rich")
    from torchfedrpc.experiments.progress.terminal_view import Workers, save_picture, view_of

    if ending == "png":
        needs("vl_convert")
    path = tmp_path / f"view.{ending}"
    save_picture(view_of(RunStatus(), STATS, Workers(), 100), path)
    content = path.read_bytes()
    if ending == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert b"worker1" in content
        assert b"url(http" not in content


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert isinstance(live_progress(Terminal(), lambda: STATS), LineProgress)
