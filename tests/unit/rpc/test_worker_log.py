"""A worker's log: bounded, in order, never waited for, and in lines that a hostile worker cannot misuse."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

from torchfedrpc.config import LogLevel
from torchfedrpc.events import WorkerLogged
from torchfedrpc.rpc.heartbeat_process import LOGGED
from torchfedrpc.rpc.log_line import LINE_BYTES, line_of, read_line
from torchfedrpc.rpc.worker_log import WorkerLog, identities


class Pipe:
    """A pipe that does not block, as that to a heartbeat process."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)

    def events(self) -> list[WorkerLogged]:
        """The records that were written since the last time."""
        data = b""
        try:
            while chunk := os.read(self.reading, 1 << 16):
                data += chunk
        except BlockingIOError:
            pass
        events = [read_line("worker1", line.removeprefix(LOGGED)) for line in data.splitlines()]
        assert None not in events
        return [event for event in events if event is not None]

    def messages(self) -> list[str]:
        return [event.message for event in self.events()]

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_streams_and_loggers_are_as_before_afterwards(pipe: Pipe) -> None:
    before = sys.stdout, sys.stderr, list(logging.root.handlers), logging.root.level, warnings.showwarning
    with WorkerLog(pipe.writing, LogLevel.debug):
        print("a line")
        logging.getLogger("some.name").debug("a record")
    assert (sys.stdout, sys.stderr, logging.root.handlers, logging.root.level, warnings.showwarning) == before
    print("after")
    assert pipe.messages() == ["a line", "a record"]


def test_off_sends_nothing_and_leaves_the_streams(pipe: Pipe) -> None:
    stdout = sys.stdout
    with WorkerLog(pipe.writing, LogLevel.off):
        assert sys.stdout is stdout
        logging.getLogger().critical("a record")
    assert pipe.messages() == []


def test_printed_lines_stay_on_their_streams_above_info(pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    with WorkerLog(pipe.writing, LogLevel.warning):
        print("a line")
        logging.getLogger().info("below")
        logging.getLogger().warning("a record")
    assert pipe.messages() == ["a record"]
    assert capsys.readouterr().out == "a line\n"


def test_printed_line_is_shown_by_worker_or_driver_but_not_by_both(
    pipe: Pipe, capsys: pytest.CaptureFixture[str]
) -> None:
    with WorkerLog(pipe.writing, LogLevel.info, identities()):
        print("the driver's terminal")
    assert capsys.readouterr().out == ""
    with WorkerLog(pipe.writing, LogLevel.info, [(0, 0), (0, 0)]):
        print("another terminal")
    assert capsys.readouterr().out == "another terminal\n"
    assert pipe.messages() == ["the driver's terminal", "another terminal"]


def test_lines_of_several_prints_and_threads_are_put_together(pipe: Pipe) -> None:
    with WorkerLog(pipe.writing, LogLevel.info, identities()):
        print("one", end=" ")
        thread = threading.Thread(target=lambda: print("other"))
        thread.start()
        thread.join()
        print("line")
        print("two\nlines")
        print("no end", end="")
    assert pipe.messages() == ["other", "one line", "two", "lines", "no end"]


def test_progress_bar_is_its_last_state(pipe: Pipe) -> None:
    with WorkerLog(pipe.writing, LogLevel.info, identities()):
        for percent in range(101):
            sys.stderr.write(f"\r{percent}%")
        sys.stderr.write("\n")
    assert pipe.messages() == ["100%"]


def test_records_beyond_the_pipe_are_dropped_at_once_and_counted(pipe: Pipe) -> None:
    with WorkerLog(pipe.writing, LogLevel.info) as log:
        began = time.monotonic()
        for number in range(5000):
            log.put(logging.INFO, "a", f"line {number}" + "x" * 100, 0.0)
        assert time.monotonic() - began < 5
        first = pipe.messages()
        log.put(logging.INFO, "a", "after", 0.0)
    assert first == [f"line {number}" + "x" * 100 for number in range(len(first))]
    told, after = pipe.messages()
    assert told.startswith(f"{5000 - len(first)} lines were dropped")
    assert after == "after"
    assert log.num_written() == len(first) + 2


def test_dropped_records_are_told_at_the_end_if_none_follows(pipe: Pipe) -> None:
    with WorkerLog(pipe.writing, LogLevel.info) as log:
        for _ in range(5000):
            log.put(logging.INFO, "a", "x" * 100, 0.0)
        pipe.messages()
    (told,) = pipe.messages()
    assert "lines were dropped" in told


def test_a_driver_that_is_gone_harms_no_print(pipe: Pipe) -> None:
    os.close(pipe.reading)
    with WorkerLog(pipe.writing, LogLevel.info):
        print("nobody reads this")
        logging.getLogger().warning("nor this")
    pipe.reading = os.dup(pipe.writing)


@pytest.mark.parametrize(
    "text", ["é" * 9000, "\N{SNOWMAN}\n" * 5000, "plain " * 3000, "\ud800" * 3000, "\x00" * 3000]
)
def test_long_message_is_cut_into_lines_that_a_pipe_takes_at_once(text: str) -> None:
    rest, parts = text, []
    while rest:
        line, rest = line_of((20, "a", "client_1", 1.0), rest)
        assert len(line) <= LINE_BYTES
        assert line.startswith(LOGGED)
        assert line.endswith(b"]\n")
        parts.append(json.loads(line[1:])[-1])
    assert "".join(parts).replace("\n", "") == text.replace("\n", "")


def test_client_id_that_fills_a_line_is_left_out() -> None:
    line, rest = line_of((20, "a", "c" * LINE_BYTES, 1.0), "text")
    assert len(line) <= LINE_BYTES
    assert json.loads(line[1:]) == [20, "a", None, 1.0, "text"]
    assert rest == ""


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[" * 5000,
        b"[]",
        b'[20, "a", "c", 1.0]',
        b'["20", "a", "c", 1.0, "text"]',
        b'[true, "a", "c", 1.0, "text"]',
        b'[2000, "a", "c", 1.0, "text"]',
        b'[-1, "a", "c", 1.0, "text"]',
        b'[20, 1, "c", 1.0, "text"]',
        b'[20, "a", 1, 1.0, "text"]',
        b'[20, "a", "c", NaN, "text"]',
        b'[20, "a", "c", 1.0, null]',
    ],
)
def test_line_of_another_form_is_no_record(line: bytes) -> None:
    assert read_line("worker1", line) is None


def test_control_characters_of_a_worker_are_shown_as_text() -> None:
    event = read_line("worker1", json.dumps([20, "a\n", None, 1, "\x1b]0;title\x07 \u202e tab\t end\nnext"]).encode())
    assert event is not None
    assert event.message == "\\x1b]0;title\\x07 \\u202e tab\t end\nnext"


def test_a_stream_has_the_encoding_of_the_one_that_it_replaces(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    with WorkerLog(pipe.writing, LogLevel.info):
        assert (sys.stdout.encoding, sys.stdout.errors) == ("ascii", "strict")
        with pytest.raises(UnicodeEncodeError):
            print("caf\u00e9")
