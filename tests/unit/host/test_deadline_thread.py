"""The deadlines' thread: calls expire in time, one that ended does not, and nothing is left behind."""

from __future__ import annotations

import pdb
import queue
import sys
import threading
import time
from collections.abc import Hashable, Iterator
from types import SimpleNamespace

import pytest

from torchfedrpc.host.deadlines import Deadlines, debugger_attached

_TIMEOUT_S = 10.0
NEVER_S = 1000.0


class Expired:
    """What ran out of time, with the moment."""

    def __init__(self) -> None:
        self._keys: queue.SimpleQueue[tuple[Hashable, float]] = queue.SimpleQueue()

    def __call__(self, key: Hashable) -> None:
        self._keys.put((key, time.monotonic()))

    def next(self) -> tuple[Hashable, float]:
        return self._keys.get(timeout=_TIMEOUT_S)

    def key(self) -> Hashable:
        return self.next()[0]

    @property
    def empty(self) -> bool:
        return self._keys.empty()


@pytest.fixture
def expired() -> Expired:
    return Expired()


@pytest.fixture
def deadlines() -> Iterator[Deadlines]:
    deadlines = Deadlines()
    yield deadlines
    deadlines.close()


def test_a_call_expires_once_it_has_had_its_time_and_not_before(deadlines: Deadlines, expired: Expired) -> None:
    begin = time.monotonic()
    deadlines.start("call", 0.05, expired)
    key, moment = expired.next()
    assert key == "call"
    assert moment - begin >= 0.05
    deadlines.start("next", 0.0, expired)
    assert expired.key() == "next"  # and "call" not again
    assert expired.empty


def test_a_call_that_ended_in_time_does_not_expire(deadlines: Deadlines, expired: Expired) -> None:
    deadlines.start("ended", 0.02, expired)
    deadlines.stop("ended")
    deadlines.start("late", 0.04, expired)
    assert expired.key() == "late"
    assert expired.empty


def test_a_shorter_deadline_does_not_wait_for_a_longer_one(deadlines: Deadlines, expired: Expired) -> None:
    deadlines.start("long", NEVER_S, expired)
    deadlines.start("short", 0.01, expired)
    assert expired.key() == "short"
    assert expired.empty


def test_deadlines_expire_in_their_own_order(deadlines: Deadlines, expired: Expired) -> None:
    for number in (3, 1, 4, 2):
        deadlines.start(number, 0.03 * number, expired)
    assert [expired.key() for _ in range(4)] == [1, 2, 3, 4]


def test_a_later_step_of_a_stream_has_its_whole_time_again(deadlines: Deadlines, expired: Expired) -> None:
    deadlines.start("stream", 0.5, expired)
    deadlines.start("stream", NEVER_S, expired)
    deadlines.start("other", 0.6, expired)
    assert expired.key() == "other"
    assert expired.empty


def test_a_deadline_can_be_brought_forward(deadlines: Deadlines, expired: Expired) -> None:
    deadlines.start("call", NEVER_S, expired)
    deadlines.start("call", 0.01, expired)
    assert expired.key() == "call"


def test_to_stop_what_has_expired_or_never_was_is_no_error(deadlines: Deadlines, expired: Expired) -> None:
    deadlines.stop("never")
    deadlines.start("call", 0.0, expired)
    assert expired.key() == "call"
    deadlines.stop("call")


def test_stopping_tells_the_time_that_is_left(deadlines: Deadlines, expired: Expired) -> None:
    begin = time.monotonic()
    deadlines.start("call", NEVER_S, expired)
    clock = deadlines.stop("call")
    assert clock is not None
    left_s, expire = clock
    assert expire is expired
    assert NEVER_S - (time.monotonic() - begin) <= left_s <= NEVER_S
    assert deadlines.stop("call") is None
    deadlines.start("late", 0.0, expired)
    expired.next()
    assert deadlines.stop("late") is None


def test_many_calls_expire_from_many_threads(deadlines: Deadlines, expired: Expired) -> None:
    start = threading.Barrier(8)

    def begin(number: int) -> None:
        start.wait(_TIMEOUT_S)
        for turn in range(50):
            deadlines.start((number, turn), 0.0, expired)
            deadlines.start((number, turn, "stopped"), NEVER_S, expired)
            deadlines.stop((number, turn, "stopped"))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    found = {expired.key() for _ in range(400)}
    for thread in threads:
        thread.join(_TIMEOUT_S)
    assert found == {(number, turn) for number in range(8) for turn in range(50)}
    assert expired.empty


def test_callback_may_begin_and_end_calls_itself() -> None:
    done = threading.Event()

    def again(key: Hashable) -> None:
        thread.stop("other")
        if key == "first":
            thread.start("second", 0.0, again)
        else:
            done.set()

    thread = Deadlines()
    thread.start("other", NEVER_S, again)
    thread.start("first", 0.0, again)
    assert done.wait(_TIMEOUT_S)
    thread.close()


def test_thread_exists_from_the_first_deadline_until_the_end(expired: Expired) -> None:
    def running() -> bool:
        return any(thread.name == "torchfedrpc-deadlines" for thread in threading.enumerate())

    deadlines = Deadlines()
    assert not running()
    deadlines.start("call", NEVER_S, expired)
    assert running()
    deadlines.close()
    assert not running()
    assert expired.empty


def test_closing_unused_deadlines_is_no_error() -> None:
    Deadlines().close()


# Debuggers.


def test_no_debugger_is_seen_where_there_is_none() -> None:
    if "pydevd" in sys.modules:
        pytest.skip("a debugger traces the tests")
    assert not debugger_attached()


def test_a_tracer_is_no_debugger() -> None:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        assert not debugger_attached()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("connected", [True, False])
def test_an_ides_debugger_counts_once_it_is_connected(monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    monkeypatch.setitem(sys.modules, "pydevd", SimpleNamespace(connected=connected))
    assert debugger_attached() is connected


@pytest.mark.parametrize("connected", [True, False])
def test_a_client_of_debugpy_counts_once_it_is_connected(monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    debugpy = SimpleNamespace(is_client_connected=lambda: connected)
    monkeypatch.setitem(sys.modules, "debugpy", debugpy)
    assert debugger_attached() is connected


def test_a_thread_that_stands_in_pdb_is_seen_from_another() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Prompt:
        """Standard input whose user has stopped to think."""

        def readline(self) -> str:
            inside.set()
            assert leave.wait(_TIMEOUT_S)
            return "continue\n"

    class Screen:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None: ...

    def stop() -> None:
        debugger = pdb.Pdb(stdin=Prompt(), stdout=Screen(), nosigint=True, readrc=False)  # type: ignore[arg-type]
        debugger.use_rawinput = False
        debugger.set_trace()
        sys.settrace(None)

    thread = threading.Thread(target=stop)
    thread.start()
    assert inside.wait(_TIMEOUT_S)
    seen = debugger_attached()
    leave.set()
    thread.join(_TIMEOUT_S)
    assert seen
