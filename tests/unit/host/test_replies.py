"""When a host's outcomes are handed over: at once where nothing waits, else together, and never much later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import torchfedrpc as tfr
from torchfedrpc.host import replies
from torchfedrpc.host.call import Outcome
from torchfedrpc.host.deadlines import Deadlines
from torchfedrpc.host.replies import Replies

SHORT = Outcome("value", seconds=0.0001)


class Line:
    """Calls that wait, and what was replied, burst by burst."""

    def __init__(self) -> None:
        self.num_waiting = 0
        self.bursts: list[list[str]] = []
        self.deadlines = Deadlines(lambda key: key.late())  # type: ignore[attr-defined]
        self.replies = Replies(lambda: self.num_waiting, self.together, self.deadlines)
        self.came = threading.Event()
        self._is_together = False

    @contextmanager
    def together(self) -> Iterator[None]:
        self.bursts.append([])
        self._is_together = True
        yield
        self._is_together = False

    def put(self, name: str, outcome: Outcome = SHORT, **kwargs: Any) -> None:
        self.replies.put(lambda _: self._take(name), outcome, **kwargs)

    def _take(self, name: str) -> None:
        if not self._is_together:
            self.bursts.append([])
        self.bursts[-1].append(name)
        self.came.set()


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(replies, "_ENOUGH_S", 60.0)  # a busy machine is not to tell for us
    monkeypatch.setattr(replies, "_MOST_S", 60.0)
    line = Line()
    yield line
    line.deadlines.close()


def test_where_no_call_waits_each_is_told_at_once(line: Line) -> None:
    line.put("a")
    line.put("b")
    assert line.bursts == [["a"], ["b"]]


def test_while_calls_wait_as_many_are_held_as_there_are(line: Line) -> None:
    for waiting, name in zip((4, 3, 2, 1, 0), "abcde", strict=True):
        line.num_waiting = waiting
        line.put(name)
    assert line.bursts == [["a", "b", "c"], ["d", "e"]]


def test_parts_of_a_reduction_are_told_once_no_call_waits(line: Line) -> None:
    for waiting, name in zip((4, 3, 2, 1, 0), "abcde", strict=True):
        line.num_waiting = waiting
        line.put(name, can_wait=True)
    assert line.bursts == [["a", "b", "c", "d", "e"]]


def test_that_of_a_long_call_is_told_at_once_with_those_before_it(line: Line) -> None:
    line.num_waiting = 9
    line.put("a")
    line.put("b", Outcome("value", seconds=60.0))
    assert line.bursts == [["a", "b"]]


def test_none_waits_for_a_long_call_behind_it(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_MOST_S", 0.01)
    line.num_waiting = 9
    line.put("a")
    assert line.came.wait(10), "it was held for good"
    assert line.bursts == [["a"]]


def test_a_call_that_nobody_waits_for_lets_those_before_it_go(line: Line) -> None:
    line.num_waiting = 2
    line.put("a", can_wait=True)
    line.num_waiting = 0
    line.replies.put(None, Outcome("cancelled"))
    assert line.bursts == [["a"]]


def test_a_reply_that_fails_takes_no_other_along(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    def fail(outcome: Outcome) -> None:
        raise ValueError("asked to fail")

    line.num_waiting = 3
    line.put("a", can_wait=True)
    line.replies.put(fail, SHORT, can_wait=True)
    line.num_waiting = 0
    line.put("b")
    assert line.bursts == [["a", "b"]]
    assert "asked to fail" in caplog.text


def test_what_is_gathered_goes_together(line: Line) -> None:
    with line.replies.gathered():
        line.put("a")
        line.put("b")
        assert line.bursts == []
    assert line.bursts == [["a", "b"]]


def test_nothing_is_held_where_faults_are_armed(line: Line) -> None:
    line.num_waiting = 9
    line.replies.are_held = False
    line.put("a")
    assert line.bursts == [["a"]]


class Counting:
    """A learner whose results are added up."""

    def __init__(self, client_id: str) -> None: ...

    def one(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("options", "can_wait"), [({}, True), ({"timeout_s": 30}, False), ({"min_results": 2}, False)]
)
async def test_parts_can_wait_where_neither_deadline_nor_quorum_counts_their_calls(
    options: dict[str, Any], can_wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, seen = Replies.put, []

    def note(self: Replies, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        put(self, *args, **kwargs)

    monkeypatch.setattr(Replies, "put", note)
    async with tfr.LearnerProxy(Counting, ["a", "b"], runtime="local") as proxy:
        reduced = await proxy.clients().options(**options).reduce("one", tfr.Sum())
    assert reduced.value == 2
    assert seen[:2] == [{"can_wait": can_wait}] * 2
